"""A small Llama trained from nothing on documentation: weights that were never quantized, to measure quantization on.

    python benchmarks/train_small.py WORK --text FOLDER [FOLDER …] [--size 88m|71m|small] [--minutes 6]

Or in two parts, the first of which wants no GPU and leaves all that the second needs in WORK:

    python benchmarks/train_small.py WORK --text FOLDER [FOLDER …] [--size …] --prepare
    python benchmarks/train_small.py WORK [--size …] [--minutes 6]

Takes every .txt, .rst and .md below the folders (packed with gzip or not), such as Debian's python3.11-doc and
linux-doc. One file in fifty is held out. Writes WORK/model (a Hugging Face checkpoint in bfloat16 with a SentencePiece
tokenizer and a chat template), WORK/train.jsonl and WORK/held_out.jsonl (rows: a passage, and how the text goes on) and
WORK/train_small.json (conditions, loss, held-out perplexity). Runs on a GPU where there is one.
"""

import argparse
import gzip
import io
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from tests.tiny import CHAT_TEMPLATE, SPECIAL, tokenizer_of
from toolchain.data.rows import Row, read_rows, write_rows

# Widths are multiples of 256, the block of K-quants.
SIZES: dict[str, dict[str, Any]] = {
    "88m": {"hidden": 768, "intermediate": 2048, "layers": 12, "heads": 12, "key_values": 4, "vocabulary": 16384},
    "71m": {
        "family": "qwen3", "hidden": 512, "intermediate": 1536, "layers": 20, "heads": 8, "key_values": 4,
        "vocabulary": 16384,
    },
    "small": {"hidden": 256, "intermediate": 768, "layers": 6, "heads": 4, "key_values": 2, "vocabulary": 4096},
}  # fmt: skip
CONTEXT = 512
SUFFIXES = (".txt", ".rst", ".md")
PROMPT, ANSWER = 32, 96
TOKENS = "tokens.npy"


def documents(folders: list[Path]) -> Iterator[str]:
    """Text files of some length, in the order of their names."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = path.name.removesuffix(".gz")
            if not path.is_file() or not name.endswith(SUFFIXES):
                continue
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode("utf-8", "ignore")
            if len(text) > 2000:
                yield text


def train_tokenizer(texts: list[str], size: int, *, prefix: bool) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    lines = (line[:4000] for text in texts for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=prefix, remove_extra_whitespaces=False, split_digits=True,
        input_sentence_size=200_000, shuffle_input_sentence=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        unk_piece=SPECIAL[0], bos_piece=SPECIAL[1], eos_piece=SPECIAL[2], pad_piece=SPECIAL[3], minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def make_model(size: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    qwen = size.get("family") == "qwen3"
    config = (Qwen3Config if qwen else LlamaConfig)(
        vocab_size=size["vocabulary"], hidden_size=size["hidden"], intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["key_values"],
        head_dim=size["hidden"] // size["heads"], max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(
    model: Any, tokens: np.ndarray[Any, Any], *, minutes: float, batch: int, device: str
) -> tuple[list[float], int]:
    """AdamW, a cosine over the time that there is. Returns mean losses of ten stretches, and the steps."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = np.random.default_rng(0)
    started, losses, step = time.monotonic(), [], 0
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        rate = 1e-3 * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = generator.integers(0, len(tokens) - CONTEXT - 1, batch)
        ids = torch.from_numpy(np.stack([tokens[at : at + CONTEXT] for at in starts]).astype(np.int64)).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {share:.0%}  loss {float(loss):.3f}", file=sys.stderr, flush=True)
    values = torch.stack(losses).float().cpu().numpy()
    return [float(part.mean()) for part in np.array_split(values, 10)], step


def make_rows(texts: list[str], tokenizer: Any, count: int) -> list[Row]:
    """Passages from all over the texts, none twice."""
    order = random.Random(0)
    pieces = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [ids[at : at + PROMPT + ANSWER] for at in range(0, len(ids) - PROMPT - ANSWER, PROMPT + ANSWER)]
    chosen = order.sample(pieces, min(count, len(pieces)))
    return [
        Row(str(at), (), tokenizer.decode(ids[PROMPT:]), tuple(ids[:PROMPT]), tuple(ids[PROMPT:]), "length")
        for at, ids in enumerate(chosen)
    ]


def prepare(work: Path, texts: list[str], size: dict[str, Any], rows: int) -> None:
    """The tokenizer, the tokens to train on, and rows, in `work`."""
    # llama.cpp's converter reads that there is no space before a text for Llama alone.
    prefix = size.get("family") == "qwen3"
    held_out = texts[::50]
    train_texts = [text for at, text in enumerate(texts) if at % 50]
    made = work / "model"
    made.mkdir(parents=True)
    proto = train_tokenizer(train_texts, size["vocabulary"], prefix=prefix)
    (made / "tokenizer.model").write_bytes(proto)
    tokenizer = tokenizer_of(proto, CHAT_TEMPLATE, prefix=prefix)
    tokenizer.save_pretrained(made)
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False, "add_eos_token": False}))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in train_texts]
    np.save(work / TOKENS, np.concatenate([np.array([*part, 2], np.uint16) for part in ids]))
    write_rows(work / "train.jsonl", make_rows(train_texts, tokenizer, rows))
    write_rows(work / "held_out.jsonl", make_rows(held_out, tokenizer, rows // 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--size", choices=sorted(SIZES), default="88m")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=600, help="to train on; a fifth as many are held out")
    parser.add_argument("--prepare", action="store_true", help="stop before training")
    given = parser.parse_args()
    size = SIZES[given.size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (given.work / TOKENS).exists():
        texts = list(documents(given.text))
        if not texts:
            parser.error(f"no {TOKENS} in {given.work}, and no text below --text")
        prepare(given.work, texts, size, given.rows)
    tokens = np.load(given.work / TOKENS)
    print(f"{len(tokens):,} tokens to train on", file=sys.stderr, flush=True)
    if given.prepare:
        return
    model = make_model(size)
    losses, steps = train(model, tokens, minutes=given.minutes, batch=given.batch, device=device)
    model.eval()
    rows = read_rows(given.work / "held_out.jsonl")
    with torch.no_grad():
        batch = torch.tensor([row.token_ids for row in rows], device=device)
        perplexity = math.exp(float(model(input_ids=batch, labels=batch).loss))
    made = given.work / "model"
    model.to("cpu", torch.bfloat16).save_pretrained(made)
    (made / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}) + "\n"
    )
    found = {
        "size": given.size,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "train_tokens": len(tokens),
        "steps": steps,
        "tokens_seen": steps * given.batch * CONTEXT,
        "minutes": given.minutes,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "losses": losses,
        "held_out_perplexity": perplexity,
    }
    (given.work / "train_small.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
