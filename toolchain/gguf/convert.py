"""Merged checkpoint → 16-bit GGUF. Reads a Hugging Face folder; writes model-f16.gguf, then proves its tokenizer.

A GGUF whose tokenizer, template, special tokens or logits differ from the checkpoint's answers badly without an error,
so a difference stops the run.
"""

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain import process
from toolchain.data.rows import Row
from toolchain.disk import require_free
from toolchain.errors import ExternalToolError, GateError, ModelError
from toolchain.gguf import score
from toolchain.gguf.card import metadata, model_card
from toolchain.gguf.header import GgufFacts, read_facts
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Card
from toolchain.reporter import Reporter, bar

OUTPUT = "model-f16.gguf"
_MARGIN_BYTES = 32 << 20
_BATCH_TOKENS = 1024
"""Of the comparison: every batch reads the checkpoint once."""

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

_CODE = "def f(x):\n    return {k: v for k, v in x.items()}\n"
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "How do I list files?"}],
    [
        {"role": "user", "content": "Hi  there\n"},
        {"role": "assistant", "content": "Hello. 123"},
        {"role": "user", "content": "Größe 🚀?"},
    ],
    [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": f"Explain:\n{_CODE}"}],
    [
        {"role": "system", "content": "日本語で答えてください。"},
        {"role": "user", "content": "एक फ़ाइल 🗑️ कैसे हटाएँ?"},
        {"role": "assistant", "content": f"Like this:\n```python\n{_CODE}```"},
        {"role": "user", "content": "  And <b>now</b>?\t"},
    ],
)
"""Templates that know no system message are spared those with one."""


def run(
    card: Card, *, model: Path, name: str, version: str, max_kl: float, llama: LlamaCpp, out: Path, report: Reporter
) -> dict[str, Any]:
    """Convert the checkpoint in `model` to `out`/model-f16.gguf, labelled `name`; returns metrics.

    Raises ModelError for a checkpoint that cannot be converted or whose tokenizer comes out different.
    """
    check_checkpoint(model)
    target = out / OUTPUT
    require_free(out, _foretell(model), "the 16-bit GGUF", report=report)
    started = time.perf_counter()
    log = out / "logs" / "convert.log"
    with bar(report, "converting to GGUF", total=100, unit="%") as task, tempfile.TemporaryDirectory() as folder:
        # The converter reads a name, a version and a size out of the folder's name, and a licence out of README.md.
        named = Path(folder) / name
        named.mkdir()
        for path in model.resolve().iterdir():
            if path.name != "README.md":
                (named / path.name).symlink_to(path)
        (named / "README.md").write_text(model_card(card), encoding="utf-8")
        facts_file = Path(folder) / "metadata.json"
        facts_file.write_text(json.dumps(metadata(card, name=name, version=version, source=model)), encoding="utf-8")
        done = 0

        def on_line(line: str) -> None:
            nonlocal done
            written = re.match(r"Writing:\s+(\d+)%", line)
            if written:
                task.advance(int(written[1]) - done)
                done = int(written[1])

        unknown = False

        def on_output(line: str) -> None:
            nonlocal unknown
            unknown |= "BPE pre-tokenizer was not recognized" in line
            on_line(line)

        try:
            process.run(
                convert_argv(llama.converter, named, target, metadata=facts_file),
                log=log,
                env=convert_env(llama),
                on_line=on_output,
                hint=f"full output: {log}; llama.cpp is pinned in docker/versions.toml",
            )
        except ExternalToolError as error:
            if not unknown:
                raise
            raise ModelError(
                f"{model}: llama.cpp does not know how this tokenizer splits text: its tokenizer.json is not that of a "
                "published model",
                hint="take the tokenizer files of the student's own model; one that was trained or changed by hand "
                "cannot be converted",
            ) from error
    seconds = time.perf_counter() - started
    facts = read_facts(target)
    probed = check_tokenizer(target, facts, model=model, llama=llama)
    if probed.read_as_control:
        report.line(f"llama.cpp reads {', '.join(probed.read_as_control)} in a text as a special token")
    mean_kl = check_logits(target, probed.texts, model=model, max_kl=max_kl, llama=llama, report=report)
    return {
        "summary": f"{facts.file_bytes / 1e6:.1f} MB, {2 * len(probed.texts)} texts tokenized as in the checkpoint, "
        f"KL(checkpoint ‖ GGUF) {mean_kl:.1e}",
        "seconds": round(seconds, 3),
        "file_bytes": facts.file_bytes,
        "parameters": facts.parameters,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "tensor_types": facts.tensor_types,
        "pre_tokenizer": facts.pre_tokenizer,
        "chat_template_sha256": facts.chat_template_sha256,
        "tokenizer_probes": 2 * len(probed.texts),
        "read_as_control": probed.read_as_control,
        "mean_kl": mean_kl,
    }


def _foretell(model: Path) -> int:
    """Bytes of a 16-bit GGUF of the checkpoint, and a margin for header, vocabulary and the vectors, of 32 bits."""
    from toolchain.student.load import tensors_of

    return 2 * sum(math.prod(tensor.shape) for tensor in tensors_of(model).values()) + _MARGIN_BYTES


def convert_argv(converter: Path, model: Path, out: Path, *, metadata: Path) -> list[str]:
    options = ["--outfile", str(out), "--outtype", "f16", "--metadata", str(metadata)]
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


@dataclass(frozen=True)
class Probed:
    """What the tokenizers were compared on."""

    texts: tuple[str, ...]
    """Each with and without bos and eos."""
    read_as_control: tuple[str, ...]
    """Plain tokens of the checkpoint that llama.cpp takes for special ones; none of them is in the texts."""


def check_tokenizer(gguf: Path, facts: GgufFacts, *, model: Path, llama: LlamaCpp) -> Probed:
    """Compare the GGUF's tokenizer, as llama.cpp runs it, with the checkpoint's.

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
        texts += _chats(tokenizer)
    with score.open_model(gguf, llama=llama, check=True) as opened:
        vocabulary = score.Vocabulary(score.bindings(llama), opened)
        # Qwen's vocabulary has a plain token "</s>", which llama.cpp takes for a special one: so it does with every
        # GGUF of Qwen, and it is of no weight where no text has it.
        special = {int(token_id) for token_id in tokenizer.added_tokens_decoder}
        overridden = [text for token_id, text in vocabulary.control_tokens().items() if token_id not in special]
        for token in overridden:
            texts = [text.replace(token, "") for text in texts]
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
    return Probed(tuple(texts), tuple(overridden))


def _chats(tokenizer: Any) -> list[str]:
    """Rendered chats, one of them with the tokenizer's special tokens written by the user."""
    from jinja2 import TemplateError

    asked = [{"role": "user", "content": f"What does {''.join(tokenizer.all_special_tokens)} mean?"}]
    texts = []
    for chat in (*_CHATS, asked):
        try:
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except TemplateError:
            # A template refuses what it was not written for: a system message, as Gemma's does.
            if chat[0]["role"] != "system":
                raise
    return texts


def check_logits(
    gguf: Path, texts: Sequence[str], *, model: Path, max_kl: float, llama: LlamaCpp, report: Reporter
) -> float:
    """Mean KL(checkpoint ‖ GGUF) in nats over the tokens of `texts`, by Transformers in float32 and by llama.cpp.

    Raises GateError above `max_kl`, with the place where they are furthest apart.
    """
    from toolchain.student.load import answer_logprobs, load_layer_by_layer, load_tokenizer

    tokenizer = load_tokenizer(model)
    encoded = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    rows = [Row(str(at), (), "", ids[:1], ids[1:], "length") for at, ids in enumerate(encoded) if len(ids) > 1]
    by_checkpoint = answer_logprobs(load_layer_by_layer(model), rows, batch_tokens=_BATCH_TOKENS)
    total = tokens = 0.0
    furthest = -1.0
    where = ""
    with bar(report, "comparing checkpoint and GGUF", total=len(rows), unit="text") as task:
        for row, p, q in zip(rows, by_checkpoint, score.answer_logprobs(gguf, rows, llama=llama), strict=True):
            # A head may have more rows than the GGUF's tokens, or fewer.
            ids = min(p.shape[1], q.shape[1])
            kl = (np.exp(p[:, :ids]) * (p[:, :ids] - q[:, :ids])).sum(-1, dtype=np.float64)
            total, tokens = total + float(kl.sum()), tokens + len(kl)
            at = int(kl.argmax())
            if not kl[at] <= furthest:
                furthest = float(kl[at])
                before = tokenizer.decode(row.token_ids[: at + 1])
                first, second = (tokenizer.decode([int(scores[at].argmax())]) for scores in (p, q))
                where = f"after {_shorten(before)}: KL {furthest:.2g}, likeliest {first!r} there and {second!r} here"
            task.advance()
    mean = total / tokens
    if not mean <= max_kl:
        raise GateError(
            f"{gguf.name} does not predict what the checkpoint predicts: mean KL {mean:.2e} over {int(tokens)} tokens, "
            f"convert.max_kl is {max_kl:.2e}\n  furthest {where}",
            hint="llama.cpp computes this architecture otherwise, or the conversion lost something: "
            "see the log of the stage",
        )
    return mean


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
