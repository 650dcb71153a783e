"""Merged checkpoint → 16-bit GGUF. Reads a Hugging Face folder; writes model-f16.gguf, then proves its tokenizer.

A GGUF whose tokenizer, template, special tokens or logits differ from the checkpoint's answers badly without an error,
so a difference stops the run.
"""

import json
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.data.rows import Row
from toolchain.disk import require_free
from toolchain.errors import ExternalToolError, GateError, ModelError
from toolchain.evaluate.divergence import kl
from toolchain.gguf import score
from toolchain.gguf.card import metadata, model_card
from toolchain.gguf.checkpoint import ConvertedBeside, Text, Tokenizer, compared
from toolchain.gguf.header import GgufFacts, read_facts
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Card
from toolchain.reporter import Reporter, bar

OUTPUT = "model-f16.gguf"
CONVERT_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
}
"""No network, and the same file each time."""
_MARGIN_BYTES = 32 << 20


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
    with _converted(card, target, model=model, name=name, version=version, llama=llama, log=log, report=report) as made:
        tokenizer, beside = made
        seconds = time.perf_counter() - started
        facts = read_facts(target)
        found = _compare(target, facts, tokenizer, beside, model=model, max_kl=max_kl, llama=llama, report=report)
    return {
        "summary": f"{facts.file_bytes / 1e6:.1f} MB, {2 * found.texts} texts tokenized as in the checkpoint, "
        f"KL(checkpoint ‖ GGUF) {found.mean_kl:.1e}",
        "seconds": round(seconds, 3),
        "file_bytes": facts.file_bytes,
        "parameters": facts.parameters,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "tensor_types": facts.tensor_types,
        "pre_tokenizer": facts.pre_tokenizer,
        "chat_template_sha256": facts.chat_template_sha256,
        "tokenizer_probes": 2 * found.texts,
        "read_as_control": found.read_as_control,
        "mean_kl": found.mean_kl,
    }


def rehearse(model: Path, *, llama: LlamaCpp, report: Reporter) -> int:
    """Whether llama.cpp knows such a checkpoint and its tokenizer, by its GGUF without weights: the number of texts.

    Takes seconds, and spares the training of what cannot be converted. Raises ModelError as `run` would.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / OUTPUT
        with _converted(
            Card(), target, model=model, name="student", version="0", llama=llama, log=Path(folder) / "log",
            report=report, weights=False,
        ) as (tokenizer, beside):  # fmt: skip
            facts = read_facts(target, vocabulary_only=True)
            _check_header(target, facts, tokenizer, model=model)
            with score.open_vocabulary(target, llama=llama) as vocabulary:
                return len(_check_tokens(target, vocabulary, tokenizer, beside, model=model, report=report)[0])


@contextmanager
def _converted(
    card: Card,
    target: Path,
    *,
    model: Path,
    name: str,
    version: str,
    llama: LlamaCpp,
    log: Path,
    report: Reporter,
    weights: bool = True,
) -> Iterator[tuple[Tokenizer, ConvertedBeside]]:
    """Convert `model` to `target`, labelled `name`; what its tokenizer says, and who is to be asked about it.

    Without `weights` the GGUF has a vocabulary and no tensor. Raises ModelError.
    """
    unknown = False
    with bar(report, "converting to GGUF", total=100, unit="%") as task, tempfile.TemporaryDirectory() as folder:
        done = 0

        def on_line(line: str) -> None:
            nonlocal done, unknown
            unknown |= "BPE pre-tokenizer was not recognized" in line
            written = re.match(r"Writing:\s+(\d+)%", line)
            if written:
                task.advance(int(written[1]) - done)
                done = int(written[1])

        with ConvertedBeside(model.resolve(), log=log, env=CONVERT_ENV, on_line=on_line) as beside:
            named, facts = _label(model, card, name=name, version=version, folder=Path(folder))
            argv = convert_argv(llama.converter, named, target, metadata=facts)
            beside.start(argv if weights else [*argv, "--vocab-only"], weights=weights)
            score.bindings(llama)  # loads it meanwhile
            try:
                tokenizer = beside.tokenizer()
                beside.wait()
            except ExternalToolError as error:
                if not unknown:
                    raise
                raise ModelError(
                    f"{model}: llama.cpp does not know how this tokenizer splits text: its tokenizer.json is not that "
                    "of a published model",
                    hint="take the tokenizer files of the student's own model; one that was trained or changed by hand "
                    "cannot be converted",
                ) from error
            yield tokenizer, beside


def _label(model: Path, card: Card, *, name: str, version: str, folder: Path) -> tuple[Path, Path]:
    """The checkpoint under its name in `folder`, and a file of what the GGUF is to say of itself.

    The converter reads a name, a version and a size out of the folder's name, and a licence out of README.md.
    """
    named, facts = folder / name, folder / "metadata.json"
    named.mkdir()
    for path in model.resolve().iterdir():
        if path.name != "README.md":
            (named / path.name).symlink_to(path)
    (named / "README.md").write_text(model_card(card), encoding="utf-8")
    facts.write_text(json.dumps(metadata(card, name=name, version=version, source=model)), encoding="utf-8")
    return named, facts


def _foretell(model: Path) -> int:
    """Bytes of a 16-bit GGUF of the checkpoint, and a margin for header, vocabulary and the vectors, of 32 bits."""
    from toolchain.student.checkpoint_files import tensors_of

    return 2 * sum(math.prod(tensor.shape) for tensor in tensors_of(model).values()) + _MARGIN_BYTES


def convert_argv(converter: Path, model: Path, out: Path, *, metadata: Path) -> list[str]:
    """The converter's script and its arguments."""
    options = ["--outfile", str(out), "--outtype", "f16", "--metadata", str(metadata)]
    return [str(converter), str(model), *options]


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
class _Compared:
    """What came of the comparison."""

    texts: int
    """Each with and without bos and eos."""
    read_as_control: tuple[str, ...]
    """Plain tokens of the checkpoint that llama.cpp takes for special ones; none of them is in the texts."""
    mean_kl: float


def _compare(
    gguf: Path,
    facts: GgufFacts,
    tokenizer: Tokenizer,
    beside: ConvertedBeside,
    *,
    model: Path,
    max_kl: float,
    llama: LlamaCpp,
    report: Reporter,
) -> _Compared:
    """Tokenizer and logits of the GGUF, as llama.cpp runs it, against the checkpoint's; every weight against NaN and
    infinity.

    Raises ModelError naming both sides of a difference, GateError above `max_kl`.
    """
    _check_header(gguf, facts, tokenizer, model=model)
    with score.open_vocabulary(gguf, llama=llama) as vocabulary:
        texts, overridden = _check_tokens(gguf, vocabulary, tokenizer, beside, model=model, report=report)
    row = compared(texts)
    # All of them before the GGUF's weights are opened: their process is over then, and its memory free.
    expected = list(beside.logprobs(row))
    mean_kl = _check_logits(gguf, row, expected, max_kl=max_kl, llama=llama, report=report)
    return _Compared(len(texts), overridden, mean_kl)


def _check_tokens(
    gguf: Path,
    vocabulary: score.Vocabulary,
    tokenizer: Tokenizer,
    beside: ConvertedBeside,
    *,
    model: Path,
    report: Reporter,
) -> tuple[list[Text], tuple[str, ...]]:
    """Where answers end and the ids of every text, against the checkpoint's: the texts, and `read_as_control`.

    Raises ModelError at the first difference.
    """
    for token_id, name in tokenizer.ends:
        if not vocabulary.ends_generation(token_id):
            raise ModelError(
                f"{gguf.name}: generation_config.json ends an answer at token {token_id} ({name}), "
                "llama.cpp would go on",
                hint="set the tokenizer's eos_token to the token that ends a turn",
            )
    # Qwen's vocabulary has a plain token "</s>", which llama.cpp takes for a special one: so it does with every
    # GGUF of Qwen, and it is of no weight where no text has it.
    special = set(tokenizer.special_ids)
    overridden = tuple(text for token_id, text in vocabulary.control_tokens().items() if token_id not in special)
    if overridden:
        report.line(f"llama.cpp reads {', '.join(overridden)} in a text as a special token")
    texts = beside.texts(without=overridden)
    for text in texts:
        for add_special, expected in ((False, text.ids), (True, text.ids_with_special)):
            found = vocabulary.encode(text.text, add_special=add_special)
            if expected != found:
                raise ModelError(
                    _difference(gguf, text.text, expected, found, add_special=add_special),
                    hint=f"{model}: the tokenizer's files must be the model's own, all of them and of one release",
                )
    return texts, overridden


def _check_header(gguf: Path, facts: GgufFacts, tokenizer: Tokenizer, *, model: Path) -> None:
    for label, in_checkpoint, in_gguf in (
        ("bos", tokenizer.bos_id, facts.bos_id),
        ("eos", tokenizer.eos_id, facts.eos_id),
        ("pad", tokenizer.pad_id, facts.pad_id),
    ):
        if in_checkpoint is not None and in_checkpoint != in_gguf:
            raise ModelError(
                f"{gguf.name}: {label} is token {in_gguf}, in the checkpoint's tokenizer it is {in_checkpoint}",
                hint=f"{model}: give config.json, generation_config.json and tokenizer_config.json the same {label}",
            )
    if facts.missing_bytes:
        raise ModelError(
            f"{gguf.name}: {facts.missing_bytes} of 256 bytes have no token in it: "
            f"the converter took the checkpoint's tokenizer for another kind ({facts.tokenizer})",
            hint=f"{model}: tokenizer.json must be the model's own; a SentencePiece model needs its tokenizer.model",
        )
    if tokenizer.chat_template != facts.chat_template:
        raise ModelError(
            f"{gguf.name}: chat template differs from the checkpoint's:\n"
            f"  checkpoint: {_shorten(tokenizer.chat_template)}\n  GGUF: {_shorten(facts.chat_template)}",
            hint=f"{model}: keep one template: chat_template.jinja, or chat_template in tokenizer_config.json",
        )


def _check_logits(
    gguf: Path,
    row: Row,
    expected: Sequence[npt.NDArray[np.float32]],
    *,
    max_kl: float,
    llama: LlamaCpp,
    report: Reporter,
) -> float:
    """Mean KL(checkpoint ‖ GGUF) in nats over the tokens of `row`, by Transformers in float32 (`expected`, in pieces)
    and by llama.cpp.

    Raises ModelError for a weight that is not finite, GateError above `max_kl`, with the place where they are furthest
    apart.
    """
    tokens = len(row.answer_ids)
    found = np.empty(tokens)
    furthest, where = -1.0, ""
    with (
        bar(report, "comparing checkpoint and GGUF", total=tokens, unit="token") as task,
        score.open_model(gguf, llama=llama, check=True) as opened,
    ):
        vocabulary = score.Vocabulary(score.bindings(llama), opened)
        [scored] = score.logprobs_of(opened, [row], gguf=gguf, llama=llama)
        done = 0
        for p in expected:
            q = scored[done : done + len(p)]
            # A head may have more rows than the GGUF's tokens, or fewer.
            ids = min(p.shape[1], q.shape[1])
            here = kl(p[:, :ids], q[:, :ids])
            found[done : done + len(p)] = here
            at = int(here.argmax())
            if not here[at] <= furthest:
                furthest = float(here[at])
                before = vocabulary.decode(row.token_ids[: done + at + 1], special=True)
                first, second = (vocabulary.decode([int(s[at, :ids].argmax())], special=True) for s in (p, q))
                where = f"after …{before[-80:]!r}: KL {furthest:.2g}, likeliest {first!r} there and {second!r} here"
            done += len(p)
            task.advance(len(p))
    mean = float(found.mean())
    if not mean <= max_kl:
        raise GateError(
            f"{gguf.name} does not predict what the checkpoint predicts: mean KL {mean:.2e} over {tokens} tokens, "
            f"convert.max_kl is {max_kl:.2e}\n  furthest {where}",
            hint="llama.cpp computes this architecture otherwise, or the conversion lost something: "
            "see the log of the stage",
        )
    return mean


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
