"""Fold a LoRA adapter into its base, in float32. Writes checkpoint/ and merge.json; both are compared.

An adapter that was trained on a 4-bit base has two: the 16-bit base, and the base as its 4 bits stand for it. What the
adapter learned corrects the second; the first has lost nothing. Neither is always better (unsloth-zoo#810), so both are
scored on held-out answers, and the adapter is folded into the better one.
"""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from toolchain.data.rows import Row, read_rows
from toolchain.disk import require_free
from toolchain.errors import GateError, ModelError
from toolchain.evaluate.divergence import kl
from toolchain.recipe import Merge
from toolchain.reporter import Reporter, bar
from toolchain.student import checkpoint_files, load, precision
from toolchain.student.base import copy_tokenizer

_MARK = "merged.json"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_BATCH_TOKENS = 1024
_ROWS = 32
"""Held-out rows that are compared here, to stop early; `evaluate` compares all of them."""


def run(
    settings: Merge, *, load_in_4bit: bool, base: Path, adapter: Path, held_out: Path, out: Path, report: Reporter
) -> dict[str, Any]:
    """`base` is a checkpoint folder, `adapter` a PEFT folder, trained on it `load_in_4bit` or not; `held_out` rows.

    Raises ModelError (another base, a base that is itself merged, overflow), HostError (disk), and GateError when mean
    KL(adapter ‖ merged) over the held-out answers is above `max_kl`, both on the base that is folded into.
    """
    if (base / _MARK).exists():
        raise ModelError(f"{base}: is already a merged checkpoint", hint="merge onto the student's base instead")
    started = time.perf_counter()
    rows = read_rows(held_out)[:_ROWS]
    bases = _compare_bases(base, adapter, rows, report) if load_in_4bit else {}
    four_bits = bool(bases) and bases["4-bit"]["cross_entropy"] < bases["16-bit"]["cross_entropy"]
    checkpoint = out / "checkpoint"
    tried: dict[str, dict[str, Any]] = {}
    for dtype in ("float16", "float32") if settings.dtype == "auto" else (settings.dtype,):
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir()
        with bar(report, f"merge in {dtype}", total=None, unit="file"):
            overflow = _write(base, adapter, checkpoint, _DTYPES[dtype], four_bits=four_bits)
        if overflow is not None and settings.dtype == "auto":
            tried[dtype] = {"overflow": overflow}
            continue
        if overflow is not None:
            raise ModelError(overflow, hint="set merge.dtype = 'float32'")
        tried[dtype] = _compare(base, adapter, checkpoint, rows, report, four_bits=four_bits)
        if tried[dtype]["mean_kl"] <= settings.max_kl:
            break
    figures = tried[dtype]
    if not figures["mean_kl"] <= settings.max_kl:
        raise GateError(
            f"merged model differs from the adapter: mean KL {figures['mean_kl']:.2e} stored as {dtype}, merge.max_kl "
            f"is {settings.max_kl:.2e}",
            hint="set merge.dtype = 'auto' or 'float32', or raise merge.max_kl if you accept the loss",
        )
    name = "4-bit" if four_bits else "16-bit"
    result = {"dtype": dtype, "base": name, **figures, "tried": tried, **({"bases": bases} if bases else {})}
    (out / "merge.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return {
        **result,
        "seconds": time.perf_counter() - started,
        "summary": (f"onto the {name} base, " if bases else "")
        + f"stored as {dtype}, KL(adapter ‖ merged) {figures['mean_kl']:.1e}",
    }


def _write(base: Path, adapter: Path, checkpoint: Path, dtype: torch.dtype, *, four_bits: bool) -> str | None:
    """Fold in float32 and store as `dtype`; what overflows float16 comes back as a message. Raises ModelError."""
    merged = load_adapted(base, adapter, four_bits=four_bits).merge_and_unload(safe_merge=True)
    # Tied weights are one parameter here, and stay one in the file.
    for name, weight in merged.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ModelError(f"merged {name}: not finite", hint="the adapter is damaged, or its training diverged")
        if dtype == torch.float16 and float(weight.abs().max()) > torch.finfo(torch.float16).max:
            return f"merged {name}: {float(weight.abs().max()):.3g} is more than float16 can hold"
    merged = merged.to(dtype)
    merged.config._name_or_path = ""
    require_free(checkpoint, int(sum(weight.nbytes for weight in merged.parameters()) * 1.05), "the merged model")
    merged.save_pretrained(checkpoint)
    copy_tokenizer(base, checkpoint)
    mark = {"dtype": str(dtype).removeprefix("torch."), "four_bit_base": four_bits}
    (checkpoint / _MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")
    return None


def onto_four_bits(merged: Path) -> bool:
    """Whether the adapter of this merged checkpoint was folded into the base as 4 bits stand for it."""
    return bool(json.loads((merged / _MARK).read_text(encoding="utf-8"))["four_bit_base"])


def load_adapted(base: Path, adapter: Path, *, four_bits: bool = False) -> Any:
    """Base with adapter, in float32 on the CPU; `four_bits`: the base as its 4 bits stand for it.

    Raises ModelError when the adapter is of another base.
    """
    other = f"{adapter}: not an adapter for {base}"
    hint = "merge onto the base that the adapter was trained on"
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        stored = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{adapter}: the adapter cannot be read: {error}") from error
    model, _ = load.load_model(base, dtype=torch.float32, device="cpu")
    if four_bits:
        load.round_to_four_bits(model, base)
    # PEFT leaves layers of the base that the adapter lacks at zero, and drops those that the base lacks.
    try:
        adapted = PeftModel(model, config)
    except ValueError as error:
        raise ModelError(f"{other}: {error}", hint=hint) from error
    wanted = {
        name.replace(".default.", "."): tuple(weight.shape)
        for name, weight in adapted.named_parameters()
        if ".lora_" in name
    }
    found = {name: tuple(weight.shape) for name, weight in stored.items()}
    unlike = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if unlike:
        name = unlike[0]
        raise ModelError(
            f"{other}: {name} is {found.get(name, 'missing')} there, {wanted.get(name, 'missing')} by the base",
            hint=hint,
        )
    adapted.load_adapter(str(adapter), adapter_name="default", is_trainable=False)
    return adapted.eval()


def _compare_bases(base: Path, adapter: Path, rows: list[Row], report: Reporter) -> dict[str, dict[str, Any]]:
    """The adapter on either base: cross-entropy of the held-out answers in nats per token; how far apart they are."""
    device = _device_for(base)
    models = {name: load_adapted(base, adapter, four_bits=name == "4-bit").to(device) for name in ("4-bit", "16-bit")}
    scores = (load.answer_logprobs(model, rows, batch_tokens=_BATCH_TOKENS) for model in models.values())
    sums, total_kl, tokens = dict.fromkeys(models, 0.0), 0.0, 0
    with bar(report, "compare bases", total=len(rows), unit="row") as task:
        for row, *pair in zip(rows, *scores, strict=True):
            for name, logprobs in zip(models, pair, strict=True):
                sums[name] -= float(logprobs[np.arange(len(logprobs)), list(row.answer_ids)].sum(dtype=np.float64))
            total_kl += float(kl(*pair).sum())
            tokens += len(row.answer_ids)
            task.advance()
    bases: dict[str, dict[str, Any]] = {name: {"cross_entropy": total / tokens} for name, total in sums.items()}
    bases["16-bit"]["kl_from_4bit"] = total_kl / tokens
    return bases


def _compare(
    base: Path, adapter: Path, checkpoint: Path, rows: list[Row], report: Reporter, *, four_bits: bool
) -> dict[str, Any]:
    """Mean KL(adapter ‖ merged) in nats per answer token and share of tokens with the same likeliest id."""
    device = _device_for(base)
    with_adapter = load_adapted(base, adapter, four_bits=four_bits).to(device)
    merged, _ = load.load_model(checkpoint, dtype=torch.float32, device=device)
    total, same, tokens = 0.0, 0, 0
    with bar(report, "compare adapter and merged", total=len(rows), unit="row") as task:
        for p, q in zip(
            load.answer_logprobs(with_adapter, rows, batch_tokens=_BATCH_TOKENS),
            load.answer_logprobs(merged, rows, batch_tokens=_BATCH_TOKENS),
            strict=True,
        ):
            total += float(kl(p, q).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(p)
            task.advance()
    return {"mean_kl": total / tokens, "top1_agreement": same / tokens, "answer_tokens": tokens, "rows": len(rows)}


def _device_for(base: Path) -> torch.device:
    """Where two models of this size are scored in float32: a GPU if they leave half its free memory, else the CPU."""
    device = precision.pick_device()
    if device.type == "cuda":
        parameters = sum(math.prod(info.shape) for info in checkpoint_files.tensors_of(base).values())
        free, _ = torch.cuda.mem_get_info()
        return device if 2 * 4 * parameters < free / 2 else torch.device("cpu")
    return device
