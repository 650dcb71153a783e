"""Run the teacher once over the rows and store what it says at the answer tokens. Writes a logit cache."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from toolchain.artifact import digest_file
from toolchain.data.rows import Row, read_rows
from toolchain.errors import ArtifactError, HostError, ModelError
from toolchain.recipe import Capture
from toolchain.reporter import Reporter, bar
from toolchain.student import load, parallel, precision, vocabulary
from toolchain.teacher.logit_cache import Captured, Source, Writer, quantise, tail_codes

if TYPE_CHECKING:
    from toolchain.gguf.llama_cpp import LlamaCpp

SHARD_TOKENS = 8192
"""Answer tokens after which a shard is closed: what a kill can cost."""
_CHUNK = 256
"""Positions whose logits are held in float32 at a time."""
_PIECE = {"cpu": 16, "cuda": 256}
"""Positions that are worked on at a time: on a processor, as many as stay in its cache (five times as fast)."""

Batch = Sequence[Row]
Engine = Callable[[Sequence[Batch]], Iterator[tuple[Row, Captured]]]
"""The batches of a shard → what the cache keeps of each row, in order."""


def run(
    settings: Capture,
    *,
    temperatures: Sequence[float],
    teacher: Path,
    gguf: Path | None,
    load_in_4bit: bool,
    llama: "LlamaCpp | None",
    vocabulary: Path,
    rows: Path,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Capture `rows` (a file) with the teacher in the folder `teacher`, or with `gguf` in llama.cpp; `teacher` then
    holds its tokenizer and config alone. `vocabulary` is the verdict on the ids that teacher and student share.

    Raises ModelError for a student with other tokens and for logits that are not finite, naming the row; HostError
    where one row does not fit the GPU.
    """
    common = _common(vocabulary, teacher)
    todo = _rows(rows, vocabulary=common.ids)
    source = Source(
        teacher=weights_digest(teacher) if gguf is None else digest_file(gguf),
        tokenizer=common.tokenizer or "",
        # The rows are rendered with the student's.
        template=common.student_template or "",
        vocabulary=common.ids,
        temperatures=tuple(sorted(temperatures)),
        **{name: getattr(settings, name) for name in _KEPT},
    )
    shards = plan(todo, batch_tokens=settings.batch_tokens)
    writer = Writer(out, source)
    engine: Engine | None = None
    facts = _facts(gguf, load_in_4bit=load_in_4bit)
    seconds, tokens, resumed = 0.0, 0, 0
    with bar(report, "teacher logits", total=len(todo), unit="row") as task:
        for number, batches in enumerate(shards):
            members = [row for batch in batches for row in batch]
            if number == 1:
                parallel.wait_for_all()  # the first shard makes the codebook of the others
            if writer.has(number, [row.key for row in members]):
                resumed += len(members)
                task.advance(len(members))
                continue
            tokens += sum(len(row.token_ids) for row in members)
            if number % parallel.world() != parallel.rank():
                continue  # another process does it
            engine = engine or _engine(teacher, gguf, source, load_in_4bit=load_in_4bit, llama=llama, report=report)
            started = time.perf_counter()
            captured = []
            for row, content in engine(batches):
                captured.append((row.key, content))
                task.advance()
            writer.write(number, captured)
            seconds += time.perf_counter() - started
        parallel.wait_for_all()
    if parallel.rank() != 0:
        return {}
    size = writer.finish(len(shards))
    bytes_per_token = size["bytes"] / size["tokens"]
    return {
        "summary": f"{size['tokens']} answer tokens, {bytes_per_token:.0f} bytes each; vocabulary {common.verdict}",
        **size,
        "bytes_per_token": bytes_per_token,
        "entries_per_token": size["entries"] / size["tokens"],
        "verdict": common.verdict,
        "reasons": list(common.reasons),
        "vocabulary": common.ids,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "rows_resumed": resumed,
        "processes": parallel.world(),
        **facts,
    }


_KEPT = ("selection", "top_k", "top_p", "min_probability", "value_bits", "samples")


def _common(path: Path, teacher: Path) -> vocabulary.Comparison:
    """The verdict on teacher and student. Raises ModelError, and ArtifactError for that of another teacher."""
    found = vocabulary.read(path)
    if not found.common:
        raise ModelError(
            f"no loss over logits is defined between teacher and student: their vocabulary is {found.verdict}"
            + "".join(f"; {reason}" for reason in found.reasons),
            hint="set distill.method = 'answers' (the teacher's answers alone) or 'uld' (optimal transport between "
            "tokenizers), or choose a student of the teacher's family",
        )
    if found.tokenizer != vocabulary.tokenizer_digest(load.load_tokenizer(teacher), ids=found.ids):
        raise ArtifactError(
            f"{path}: made for another tokenizer than that of {teacher}", hint="run the `vocabulary` stage again"
        )
    return found


def _rows(path: Path, *, vocabulary: int) -> list[Row]:
    # Two rows with the same tokens are one entry of the cache.
    rows = list({row.key: row for row in read_rows(path)}.values())
    if not rows:
        raise ArtifactError(f"{path}: no rows", hint="run the `select` stage again")
    for row in rows:
        if not row.prompt_ids or not row.answer_ids:
            raise ArtifactError(f"{path}: row {row.id} has no prompt or no answer", hint="run the `select` stage again")
        if max(row.token_ids) >= vocabulary:
            raise ModelError(
                f"{path}: row {row.id} has token {max(row.token_ids)}; teacher and student share {vocabulary} ids"
            )
    return rows


def plan(rows: Sequence[Row], *, batch_tokens: int) -> list[list[list[Row]]]:
    """Shards of batches, formed by length once and for all: a resumed run cuts them in the same places."""
    ordered = sorted(rows, key=lambda row: (len(row.token_ids), row.key))
    shards: list[list[list[Row]]] = []
    tokens = SHARD_TOKENS
    for batch in load.batches_in_order(ordered, batch_tokens=batch_tokens):
        if tokens >= SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(batch)
        tokens += sum(len(row.answer_ids) for row in batch)
    return shards


def weights_digest(folder: Path) -> str:
    """SHA-256 over name and content of config.json and every safetensors file of a checkpoint."""
    whole = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        whole.update(f"{path.name} {digest_file(path)}\n".encode())
    return whole.hexdigest()


# --- What runs the teacher.


def _facts(gguf: Path | None, *, load_in_4bit: bool) -> dict[str, str]:
    """What the manifest says of the engine, whether it has to run or not."""
    if gguf is not None:
        return {"engine": "llama.cpp", "device": "cpu", "precision": "gguf"}
    device = precision.pick_device()
    dtype = str(precision.weights_type(device)).removeprefix("torch.")
    return {"engine": "transformers", "device": str(device), "precision": "4bit" if load_in_4bit else dtype}


def _engine(
    teacher: Path,
    gguf: Path | None,
    source: Source,
    *,
    load_in_4bit: bool,
    llama: "LlamaCpp | None",
    report: Reporter,
) -> Engine:
    if gguf is not None:
        assert llama is not None
        return _llama_cpp(gguf, llama, source)
    device = precision.pick_device()
    dtype = precision.weights_type(device)
    model, _ = load.load_model(teacher, dtype=dtype, device=device, load_in_4bit=load_in_4bit)
    return _transformers(model, source, report)


def _transformers(model: Any, source: Source, report: Reporter) -> Engine:
    head = load.head_of(model, vocabulary=source.vocabulary)
    told = False

    def capture(batches: Sequence[Batch]) -> Iterator[tuple[Row, Captured]]:
        nonlocal told
        left = list(reversed(batches))
        while left:
            batch = left.pop()
            try:
                found = _one_pass(model, head, batch, source)
            except torch.OutOfMemoryError:
                found = None
            if found is not None:
                yield from zip(batch, found, strict=True)
                continue
            # Out here the failed pass has let go of its tensors.
            torch.cuda.empty_cache()
            if len(batch) == 1:
                raise HostError(
                    f"row {batch[0].id}: its {len(batch[0].token_ids)} tokens alone do not fit the GPU's memory",
                    hint="lower data.max_length, or set teacher.load_in_4bit = true",
                )
            if not told:
                report.line(
                    f"{len(batch)} rows do not fit the GPU: going on in halves; a lower capture.batch_tokens fits"
                )
                told = True
            left += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]

    return capture


@torch.inference_mode()
def _one_pass(model: Any, head: load.Head, batch: Batch, source: Source) -> list[Captured]:
    # All answers of the batch in one piece: few large operations instead of many small ones.
    states = torch.cat(list(load.answer_states(model, batch)))
    return keep(batch, (head(part) for part in torch.split(states, _CHUNK)), source)


def _llama_cpp(gguf: Path, llama: "LlamaCpp", source: Source) -> Engine:
    from toolchain.gguf import score

    def capture(batches: Sequence[Batch]) -> Iterator[tuple[Row, Captured]]:
        rows = [row for batch in batches for row in batch]
        for row, logprobs in zip(rows, score.answer_logprobs(gguf, rows, llama=llama), strict=True):
            if logprobs.shape[1] < source.vocabulary:
                raise ModelError(f"{gguf}: {logprobs.shape[1]} tokens, {source.vocabulary} are shared with the student")
            logits = torch.from_numpy(logprobs[:, : source.vocabulary])
            (content,) = keep([row], torch.split(logits, _CHUNK), source)
            yield row, content

    return capture


# --- What the cache keeps.


def keep(batch: Batch, logits: Iterable[torch.Tensor], source: Source) -> list[Captured]:
    """`logits`: float32 chunks [positions, V] over the answers of the batch, one row after the other."""
    bounds = np.cumsum([0] + [len(row.answer_ids) for row in batch])
    draws = _draws(batch, source) if source.selection == "sample" else None
    parts: list[Captured] = []
    done = 0
    for part in (piece for chunk in logits for piece in torch.split(chunk, _PIECE[chunk.device.type])):
        finite = part.sum(-1).isfinite()
        if not bool(finite.all()):
            wrong = done + int(finite.int().argmin())
            row = batch[int(np.searchsorted(bounds, wrong, side="right")) - 1]
            raise ModelError(
                f"the teacher's logits for row {row.id} are not finite",
                hint="its weights are damaged or overflow 16 bits",
            )
        stop = done + len(part)
        parts.append(top_logits(part, source) if draws is None else sampled(part, draws[done:stop], source))
        done = stop
    whole = Captured(*(np.concatenate([getattr(part, name) for part in parts]) for name in _PARTS))
    entries = np.cumsum([0, *whole.counts])
    return [
        Captured(
            whole.counts[start:end],
            whole.ids[entries[start] : entries[end]],
            whole.values[entries[start] : entries[end]],
            whole.tails[start:end],
        )
        for start, end in pairwise(bounds)
    ]


_PARTS = tuple(Captured.__dataclass_fields__)


def top_logits(logits: torch.Tensor, source: Source) -> Captured:
    """Logits float32 [tokens, V] → the likeliest ids, as Capture says, and the mass of the others.

    Terms are float32 and sums float64: a sum over the vocabulary then has no error of its own, and kept mass and whole
    are sums of the very same terms. (float64 terms would cost a consumer GPU, which has few float64 units, far more.)
    """
    values, ids = logits.topk(source.most_entries, dim=-1)
    top = values[:, :1]
    totals, kept = [], []
    for temperature in source.temperatures:
        totals.append((logits - top).div_(temperature).exp_().sum(-1, dtype=torch.float64))
        kept.append((values - top).div_(temperature).exp_().double() / totals[-1][:, None])
    flattest = kept[-1]
    enough = (flattest.cumsum(-1) - flattest < source.top_p) & (flattest >= source.min_probability)
    enough[:, 0] = True
    tails = torch.stack([1 - part.masked_fill(~enough, 0.0).sum(-1) for part in kept], -1)
    # Where every id is kept there is no tail, whatever rounding left.
    tails = tails.masked_fill((enough.sum(-1) == logits.shape[-1])[:, None], 0.0)
    chosen = enough.cpu().numpy()
    return Captured(
        chosen.sum(-1),
        ids.cpu().numpy()[chosen],
        quantise(flattest.cpu().numpy()[chosen], source),
        tail_codes(tails.cpu().numpy()),
    )


def sampled(logits: torch.Tensor, draws: torch.Tensor, source: Source) -> Captured:
    """Logits float32 [tokens, V] and numbers in [0, 1) [tokens, samples] → ids drawn from p_T, and how often each.

    Random-sampling distillation (Anshumann et al. 2025, arXiv 2503.16870) with the distribution itself as proposal: the
    share of the draws that fell on an id is an unbiased estimate of its probability, and the gradient of KL(p ‖ q) is
    linear in p.
    """
    (temperature,) = source.temperatures
    steps = (logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_().cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(steps, draws.to(steps.device) * steps[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
    tokens, width = logits.shape
    at = np.arange(tokens)[:, None] * width
    found, times = np.unique(ids.cpu().numpy() + at, return_counts=True)
    counts = np.bincount(found // width, minlength=tokens)
    return Captured(counts, found % width, times - 1, np.zeros((tokens, 1), np.int64))


def _draws(batch: Batch, source: Source) -> torch.Tensor:
    """float64 [positions, samples] in [0, 1), from the rows' keys alone: the same in every batch, on every device."""
    parts = []
    for row in batch:
        generator = torch.Generator().manual_seed(int(row.key[:15], 16))
        parts.append(torch.rand(len(row.answer_ids), source.samples, generator=generator, dtype=torch.float64))
    return torch.cat(parts)
