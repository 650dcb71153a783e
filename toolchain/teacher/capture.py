"""Run the teacher once over the rows and store its top-k logits at the answer tokens. Writes a logit cache."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.data.rows import Row, read_rows
from toolchain.errors import ModelError
from toolchain.recipe import Capture
from toolchain.reporter import Reporter, bar
from toolchain.student import load, precision, vocabulary
from toolchain.teacher.logit_cache import Captured, Source, Writer, compress

SHARD_TOKENS = 8192
"""Answer tokens after which a shard is closed: what a kill can cost."""
_CHUNK = 256


def run(
    settings: Capture,
    *,
    temperatures: Sequence[float],
    teacher: Path,
    student: Path,
    rows: Path,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Capture `rows` (a file) for a student with the teacher's tokens. `teacher`, `student`: checkpoint folders.

    Raises ModelError for different tokenizers or templates and for logits that are not finite, naming the row.
    """
    comparison = vocabulary.require_common(teacher, student)
    tokenizer = load.load_tokenizer(teacher)
    width = comparison.ids
    # Two rows with the same tokens are one entry of the cache.
    todo = list({row.key: row for row in read_rows(rows)}.values())
    for row in todo:
        if max(row.token_ids) >= width:
            raise ModelError(
                f"{rows}: row {row.id} has token {max(row.token_ids)}; teacher and student share {width} ids"
            )
    source = Source(
        teacher=weights_digest(teacher),
        tokenizer=vocabulary.tokenizer_digest(tokenizer, ids=width),
        template=comparison.teacher_template or "",
        vocabulary=width,
        temperatures=tuple(sorted(temperatures)),
        top_k=min(settings.top_k, width),
        top_p=settings.top_p,
    )
    shards = plan(todo, batch_tokens=settings.batch_tokens)
    writer = Writer(out, source)
    device = precision.pick_device()
    dtype = precision.weights_type(device)
    model = None
    seconds, tokens, resumed = 0.0, 0, 0
    with bar(report, "teacher logits", total=len(todo), unit="row") as task:
        for number, batches in enumerate(shards):
            members = [row for batch in batches for row in batch]
            if writer.has(number, [row.key for row in members]):
                resumed += len(members)
                task.advance(len(members))
                continue
            model = model or load.load_model(teacher, dtype=dtype, device=device)[0]
            started = time.perf_counter()
            captured: list[tuple[str, Captured]] = []
            for batch in batches:
                captured += zip((row.key for row in batch), _capture(model, batch, source), strict=True)
                task.advance(len(batch))
            writer.write(number, captured)
            seconds += time.perf_counter() - started
            tokens += sum(len(row.token_ids) for row in members)
    size = writer.finish(len(shards))
    bytes_per_token = size["bytes"] / size["tokens"]
    return {
        "summary": f"{size['tokens']} answer tokens, {bytes_per_token:.0f} bytes each; vocabulary {comparison.verdict}",
        **size,
        "bytes_per_token": bytes_per_token,
        "entries_per_token": size["entries"] / size["tokens"],
        "verdict": comparison.verdict,
        "reasons": list(comparison.reasons),
        "vocabulary": width,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "rows_resumed": resumed,
        "engine": "transformers",
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
    }


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
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


@torch.inference_mode()
def _capture(model: Any, batch: Sequence[Row], source: Source) -> list[Captured]:
    head = load.head_of(model, vocabulary=source.vocabulary)
    captured = []
    for row, state in zip(batch, load.answer_states(model, batch), strict=True):
        parts = [top_logits(head(part), source) for part in torch.split(state, _CHUNK)]
        if any(part is None for part in parts):
            raise ModelError(
                f"the teacher's logits for row {row.id} are not finite",
                hint="its weights are damaged or overflow 16 bits",
            )
        captured.append(_join([part for part in parts if part is not None]))
    return captured


def top_logits(logits: torch.Tensor, source: Source) -> Captured | None:
    """Logits float32 [tokens, V] → what the cache keeps of them; None when they are not finite.

    A position keeps its likeliest ids until they hold `top_p` of the probability at the highest temperature, where the
    distribution is flattest, and `top_k` at most.
    """
    if not bool(logits.isfinite().all()):
        return None
    # float64 from here on: tail masses are small differences.
    normaliser = logits.double().logsumexp(-1)
    values, ids = logits.topk(source.top_k, dim=-1)
    values = values.double()
    kept_logprobs = {}
    for temperature in source.temperatures:
        total = (logits.double() / temperature).logsumexp(-1)
        kept_logprobs[temperature] = values / temperature - total[:, None]
    flattest = kept_logprobs[source.temperatures[-1]].exp()
    counts = (flattest.cumsum(-1) - flattest < source.top_p).sum(-1)
    beyond = torch.arange(source.top_k, device=logits.device) >= counts[:, None]
    mass = {
        temperature: logprobs.masked_fill(beyond, -torch.inf).logsumexp(-1).cpu().numpy()
        for temperature, logprobs in kept_logprobs.items()
    }
    return compress(
        ids.cpu().numpy(),
        (values - normaliser[:, None]).cpu().numpy(),
        counts.cpu().numpy(),
        mass,
        vocabulary=source.vocabulary,
    )


def _join(parts: Sequence[Captured]) -> Captured:
    return Captured(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Captured.__dataclass_fields__)
    )
