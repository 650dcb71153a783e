"""Merged checkpoint → 16-bit GGUF. Reads a Hugging Face folder; writes model-f16.gguf, then proves its tokenizer.

A GGUF whose tokenizer, template or special tokens differ from the checkpoint's answers badly without an error, so a
difference stops the run.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.errors import ModelError
from toolchain.gguf import score
from toolchain.gguf.header import GgufFacts, read_facts
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.reporter import Reporter, bar

OUTPUT = "model-f16.gguf"

PROBES = (
    "Hello, world!",
    "  two spaces before, three after   ",
    "line one\nline two\n\n\nline five\r\n\ttab\t\ttabs",
    " \n \t\n",
    "Größe, naïve, façade, ﬁne — “quoted” … ½ €",
    "日本語のテキスト と 中文字符, русский текст, العربية, हिन्दी",
    "emoji 🚀🚀 👩‍👩‍👧 é (combining) \u200b(zero width)",
    "def f(x: int) -> list[int]:\n    return [x ** 2 for _ in range(10)]  # ok?\n",
    "SELECT * FROM `t` WHERE a != 'b' AND c >= 1e-3; -- x\\y /usr/local/bin",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0xFF",
    "I'm you'll we've THEY'RE don't isn't 'quoted'",
    "<b>not special</b> <|nothing|> [INST] </s> <s>",
)
"""Texts on which tokenizers are known to part ways."""

_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "How do I list files?"}],
    [
        {"role": "user", "content": "Hi  there\n"},
        {"role": "assistant", "content": "Hello. 123"},
        {"role": "user", "content": "Größe 🚀?"},
    ],
)


def run(*, model: Path, name: str, llama: LlamaCpp, out: Path, report: Reporter) -> dict[str, Any]:
    """Convert the checkpoint in `model` to `out`/model-f16.gguf, labelled `name`; returns metrics.

    Raises ModelError for a checkpoint that cannot be converted or whose tokenizer comes out different.
    """
    check_checkpoint(model)
    started = time.perf_counter()
    target = out / OUTPUT
    log = out / "logs" / "convert.log"
    with bar(report, "converting to GGUF", total=100, unit="%") as task, tempfile.TemporaryDirectory() as folder:
        # The converter reads a name, a version and a size out of the folder's name: give it one that is the recipe's.
        named = Path(folder) / name
        named.symlink_to(model.resolve(), target_is_directory=True)
        done = 0

        def on_line(line: str) -> None:
            nonlocal done
            written = re.match(r"Writing:\s+(\d+)%", line)
            if written:
                task.advance(int(written[1]) - done)
                done = int(written[1])

        process.run(
            convert_argv(llama.converter, named, target, name=name),
            log=log,
            env=convert_env(llama),
            on_line=on_line,
            hint=f"full output: {log}; llama.cpp is pinned in docker/versions.toml",
        )
    seconds = time.perf_counter() - started
    facts = read_facts(target)
    probes = check_tokenizer(target, facts, model=model, llama=llama)
    return {
        "summary": f"{facts.file_bytes / 1e6:.1f} MB, {probes} texts tokenized as in the checkpoint",
        "seconds": round(seconds, 3),
        "file_bytes": facts.file_bytes,
        "parameters": facts.parameters,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "tensor_types": facts.tensor_types,
        "pre_tokenizer": facts.pre_tokenizer,
        "chat_template_sha256": facts.chat_template_sha256,
        "tokenizer_probes": probes,
    }


def convert_argv(converter: Path, model: Path, out: Path, *, name: str) -> list[str]:
    options = ["--outfile", str(out), "--outtype", "f16", "--model-name", name]
    return [sys.executable, str(converter), str(model), *options]


def convert_env(llama: LlamaCpp) -> Mapping[str, str]:
    """The converter uses the gguf package of its own tree, and no network."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONPATH": str(llama.source / "gguf-py"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
    }


def check_checkpoint(model: Path) -> None:
    """Raises ModelError when `model` has no config, has weights only as pickles, or lacks a shard."""
    if not (model / "config.json").is_file():
        raise ModelError(f"{model}: no config.json: not a Hugging Face checkpoint")
    index = model / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: not an index of shards: {error}") from None
        missing = [shard for shard in needed if not (model / shard).is_file()]
        if missing:
            raise ModelError(
                f"{model}: {len(missing)} of {len(needed)} shards missing: {', '.join(missing)}",
                hint="copy the whole checkpoint folder again",
            )
    elif not any(model.glob("*.safetensors")):
        pickles = sorted(path.name for path in model.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if pickles:
            raise ModelError(
                f"{model}: weights only as pickle ({pickles[0]}), which runs code when it is opened",
                hint="save the checkpoint as safetensors: model.save_pretrained(folder, safe_serialization=True)",
            )
        raise ModelError(f"{model}: no .safetensors file in it")


def check_tokenizer(gguf: Path, facts: GgufFacts, *, model: Path, llama: LlamaCpp) -> int:
    """Compare the GGUF's tokenizer, as llama.cpp runs it, with the checkpoint's; returns how many texts were compared.

    Also has llama.cpp check every weight for NaN and infinity. Raises ModelError naming both sides of a difference.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    for label, in_checkpoint, in_gguf in (
        ("bos", tokenizer.bos_token_id, facts.bos_id),
        ("eos", tokenizer.eos_token_id, facts.eos_id),
        ("pad", tokenizer.pad_token_id, facts.pad_id),
    ):
        if in_checkpoint is not None and in_checkpoint != in_gguf:
            raise ModelError(
                f"{gguf.name}: {label} is token {in_gguf}, in the checkpoint's tokenizer it is {in_checkpoint}"
            )
    if facts.missing_bytes:
        raise ModelError(
            f"{gguf.name}: {facts.missing_bytes} of 256 bytes have no token in it: "
            f"the converter took the checkpoint's tokenizer for another kind ({facts.tokenizer})",
            hint=f"{model}: tokenizer.json must be the model's own; a SentencePiece model needs its tokenizer.model",
        )
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template != facts.chat_template:
        raise ModelError(
            f"{gguf.name}: chat template differs from the checkpoint's:\n"
            f"  checkpoint: {_shorten(template)}\n  GGUF: {_shorten(facts.chat_template)}"
        )
    texts = list(PROBES)
    texts += [f"a {token} b{token}" for token in tokenizer.all_special_tokens]
    if template is not None:
        for chat in _CHATS:
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    with score.open_model(gguf, llama=llama, check=True) as opened:
        vocabulary = score.Vocabulary(score.bindings(llama), opened)
        for text in texts:
            for add_special in (False, True):
                expected = list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
                found = vocabulary.encode(text, add_special=add_special)
                if expected != found:
                    raise ModelError(_difference(gguf, text, expected, found, add_special=add_special))
        for token_id in _generation_eos_ids(model):
            if not vocabulary.ends_generation(token_id):
                raise ModelError(
                    f"{gguf.name}: generation_config.json ends an answer at token {token_id} "
                    f"({tokenizer.convert_ids_to_tokens(token_id)}), llama.cpp would go on",
                    hint="set the tokenizer's eos_token to the token that ends a turn",
                )
    return 2 * len(texts)


def _generation_eos_ids(model: Path) -> list[int]:
    path = model / "generation_config.json"
    if not path.is_file():
        return []
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if value is None else value if isinstance(value, list) else [value]


def _difference(gguf: Path, text: str, expected: list[int], found: list[int], *, add_special: bool) -> str:
    at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    where = min(len(expected), len(found)) if at is None else at
    window = slice(max(0, where - 2), where + 6)
    return (
        f"{gguf.name}: its tokenizer differs from the checkpoint's on {_shorten(text)}"
        f"{' with bos and eos' if add_special else ''}, from token {where}:\n"
        f"  checkpoint: … {expected[window]} ({len(expected)} tokens)\n"
        f"  llama.cpp: … {found[window]} ({len(found)} tokens)"
    )


def _shorten(text: str | None) -> str:
    shown = repr(text)
    return shown if len(shown) <= 160 else shown[:157] + "…"
