"""A small Llama trained from nothing on documentation: weights that were never quantized, to measure quantization on.

    python benchmarks/train_small.py WORK --text FOLDER [FOLDER …] [--size 88m|small] [--minutes 6]

Takes every .txt, .rst and .md below the folders (packed with gzip or not), such as Debian's python3.11-doc and
linux-doc. One file in fifty is held out. Writes WORK/model (a Hugging Face checkpoint in float16 with a SentencePiece
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
from toolchain.data.rows import Row, write_rows

# Widths are multiples of 256, the block of K-quants.
SIZES: dict[str, dict[str, int]] = {
    "88m": {"hidden": 768, "intermediate": 2048, "layers": 12, "heads": 12, "key_values": 4, "vocabulary": 16384},
    "small": {"hidden": 256, "intermediate": 768, "layers": 6, "heads": 4, "key_values": 2, "vocabulary": 4096},
}
CONTEXT = 512
SUFFIXES = (".txt", ".rst", ".md")
PROMPT, ANSWER = 32, 96


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


def train_tokenizer(texts: list[str], size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    lines = (line[:4000] for text in texts for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        input_sentence_size=200_000, shuffle_input_sentence=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        unk_piece=SPECIAL[0], bos_piece=SPECIAL[1], eos_piece=SPECIAL[2], pad_piece=SPECIAL[3], minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def make_model(size: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size["vocabulary"], hidden_size=size["hidden"], intermediate_size=size["intermediate"],
            num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
            num_key_value_heads=size["key_values"], max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2, pad_token_id=3,
        )
    )  # fmt: skip


def train(model: Any, tokens: np.ndarray[Any, Any], *, minutes: float, batch: int, device: str) -> list[float]:
    """AdamW, a cosine over the time that there is; mean losses of ten stretches."""
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
    return [float(part.mean()) for part in np.array_split(values, 10)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--size", choices=sorted(SIZES), default="88m")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=600, help="to train on; a fifth as many are held out")
    given = parser.parse_args()
    size = SIZES[given.size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = list(documents(given.text))
    held_out = texts[::50]
    train_texts = [text for at, text in enumerate(texts) if at % 50]
    made = given.work / "model"
    made.mkdir(parents=True)
    proto = train_tokenizer(train_texts, size["vocabulary"])
    (made / "tokenizer.model").write_bytes(proto)
    tokenizer = tokenizer_of(proto, CHAT_TEMPLATE)
    tokenizer.save_pretrained(made)
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False, "add_eos_token": False}))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in train_texts]
    tokens = np.concatenate([np.array([*part, 2], np.uint16) for part in ids])
    print(f"{len(texts)} texts, {len(tokens):,} tokens to train on", file=sys.stderr, flush=True)
    model = make_model(size)
    losses = train(model, tokens, minutes=given.minutes, batch=given.batch, device=device)
    write_rows(given.work / "train.jsonl", make_rows(train_texts, tokenizer, given.rows))
    rows = make_rows(held_out, tokenizer, given.rows // 5)
    write_rows(given.work / "held_out.jsonl", rows)
    model.eval()
    with torch.no_grad():
        batch = torch.tensor([row.token_ids for row in rows], device=device)
        perplexity = math.exp(float(model(input_ids=batch, labels=batch).loss))
    model.to("cpu", torch.float16).save_pretrained(made)
    (made / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}) + "\n"
    )
    found = {
        "size": given.size,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "texts": len(texts),
        "train_tokens": len(tokens),
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
