"""A benchmark record against the budgets of its bundle: passed, failed, or inconclusive. Never passed on a doubt."""

import json
import math
from pathlib import Path
from typing import Any

from . import bench, files, measure
from .errors import DeviceError, UsageError

SCHEMA_VERSION = 1
_RECORD_HINT = "./edgectl bench --out FILE writes one"


def read_record(path: Path) -> dict[str, Any]:
    """A record that `bench` wrote. Raises UsageError."""
    try:
        content = files.read_small(path, files.JSON_LIMIT_BYTES)
    except DeviceError as error:
        raise UsageError(error.message, hint=_RECORD_HINT) from None
    if content is None:
        raise UsageError(f"{path}: no such file", hint=_RECORD_HINT)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}", hint=_RECORD_HINT) from None
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise UsageError(f"{path}: not a benchmark record", hint=_RECORD_HINT)
    if record.get("schema_version") != bench.SCHEMA_VERSION:
        raise UsageError(
            f"{path}: has schema version {record.get('schema_version')!r}, this edgectl reads {bench.SCHEMA_VERSION}",
            hint="use the edgectl of the bundle that was measured, or measure again",
        )
    return record


def judge(bundle: files.Bundle, record: dict[str, Any]) -> dict[str, Any]:
    """The verdict of every budget and of all together. Raises UsageError for another bundle's record."""
    if record.get("bundle") != bundle.id:
        raise UsageError(
            f"the record is of another bundle, {str(record.get('bundle'))[:19]}…, this one is {bundle.id[:19]}…",
            hint="measure this bundle: ./edgectl bench --out FILE",
        )
    budgets: dict[str, Any] = dict(bundle.presets().get("budgets") or {})
    if not budgets:
        raise UsageError(
            f"the target {bundle.manifest['target']['name']} has no budgets to be held to",
            hint="[budgets] in its profile (docs/targets.md), then build the bundle again",
        )
    try:
        general = _doubts(record, budgets.pop("power_mode", None))
        rows = [_row(name, limit, record, general) for name, limit in budgets.items()]
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"not a record as bench writes it: {error}", hint=_RECORD_HINT) from None
    return {
        "schema_version": SCHEMA_VERSION,
        "bundle": bundle.id,
        "verdict": _overall(rows),
        "doubts": general,
        "budgets": rows,
    }


def _overall(rows: list[dict[str, Any]]) -> str:
    verdicts = {row["verdict"] for row in rows}
    return next(verdict for verdict in ("failed", "inconclusive", "passed") if verdict in verdicts)


def _doubts(record: dict[str, Any], power_mode: str | list[str] | None) -> list[str]:
    """Why nothing that was measured counts."""
    doubts = []
    if record.get("measured") is not True:
        doubts.append(f"not measured on the device: {record.get('emulated')}")
    doubts += bench.state_doubts(record)
    if power_mode is not None:
        meant = [power_mode] if isinstance(power_mode, str) else power_mode
        used = [(record.get(when) or {}).get("power_mode") for when in ("device", "device_after")]
        other = [mode for mode in used if mode not in meant]
        if other:
            doubts.append(f"the power mode is {other[0] or 'unknown'}, the budgets are for {' or '.join(meant)}")
    return doubts


def _row(name: str, limit: float, record: dict[str, Any], general: list[str]) -> dict[str, Any]:
    at_least, metric, value, doubts = _value(name, record)
    doubts = [*general, *doubts]
    if value is None or doubts:
        verdict = "inconclusive"
    else:
        verdict = "passed" if (value >= limit if at_least else value <= limit) else "failed"
    return {
        "budget": name,
        "limit": limit,
        "at_least": at_least,
        "metric": metric,
        "value": value,
        "verdict": verdict,
        "because": doubts,
    }


def _value(name: str, record: dict[str, Any]) -> tuple[bool, str, float | None, list[str]]:
    """Whether more is better, which figure is meant, its value (None: not measured), and what speaks against it."""
    options, metrics, memory = record.get("options") or {}, record["metrics"], record.get("memory") or {}
    model_bytes = int((record.get("model") or {}).get("bytes") or 0)
    verified = bool((record.get("page_cache") or {}).get("eviction_verified"))
    plain: dict[str, tuple[bool, str, str]] = {
        "decode_tps": (True, f"tg{options.get('generated_tokens')}_tps", "p50"),
        "prefill_tps": (True, f"pp{options.get('prompt_tokens')}_tps", "p50"),
        "ttft_s": (False, "ttft_s", "p95"),
        "cold_start_s": (False, "cold_start_evicted_s", "p95"),
    }
    if name in plain:
        at_least, metric, share = plain[name]
        found = metrics.get(metric)
        if not found:
            return at_least, metric, None, [f"{metric} was not measured"]
        doubts = _noise(metric, found, record)
        if name == "cold_start_s" and not verified:
            doubts.append("the page cache could not be shown to be empty")
        return at_least, f"{metric} {share}", _number(found.get(share)), doubts
    if name == "memory_x_model":
        peak = memory.get("peak_rss_bytes")
        value = None if not peak or not model_bytes else peak / model_bytes
        return False, "peak_rss_bytes ÷ bytes of the model", value, [] if value else ["peak memory is not known"]
    if name == "roofline_pct":
        found = metrics.get(f"tg{options.get('generated_tokens')}_tps") or {}
        value = _number((record.get("roofline") or {}).get("pct"))
        doubts = _noise("decode", found, record) if value is not None else ["memory bandwidth was not measured"]
        if value is not None and value > 100:
            doubts.append("faster than memory: the model fits into the processor's cache")
        return True, "roofline_pct", value, doubts
    if name == "sustained_ratio":
        sustained = record.get("sustained")
        value = _number((sustained or {}).get("last_to_first"))
        if value is not None:
            # Half of a short run stands for its first minute, and half for its last.
            windows = (metrics.get("sustained_tps") or {}).get("samples") or []
            few = measure.too_few("first and last minute, ten seconds each", windows[: len(windows) // 2])
            doubts = ([few] if few else []) + _foreign(record)
        else:
            doubts = ["nothing came in the first minute" if sustained else "bench ran without --sustained"]
        return True, "last minute ÷ first minute", value, doubts
    raise DeviceError(
        f"presets.json has a budget {name!r} that this edgectl does not know", hint="copy the bundle again"
    )


def _noise(metric: str, found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    few = measure.too_few(metric, found.get("samples") or [])
    doubts = [few] if few else []
    variation = _number(found.get("variation"))
    if variation is None or variation > bench.MAX_VARIATION:
        doubts.append(
            f"{metric}: samples vary by {variation:.1%}" if variation is not None else f"{metric}: no samples"
        )
    return doubts + _foreign(record)


def _foreign(record: dict[str, Any]) -> list[str]:
    return [
        f"{part}: other programs used {share:.1%} of the processors"
        for part, share in (record.get("foreign_cpu_share") or {}).items()
        if share > bench.MAX_FOREIGN_SHARE
    ]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for row in report["budgets"]:
        value = "unknown" if row["value"] is None else f"{row['value']:.4g}"
        sign = "≥" if row["at_least"] else "≤"
        lines.append(f"{row['verdict']:<13} {row['budget']:<16} {value:>9} {sign} {row['limit']:g}  ({row['metric']})")
        lines += [f"{'':14}{reason}" for reason in row["because"] if reason not in report["doubts"]]
    return "\n".join([*report["doubts"], *lines, f"all together: {report['verdict']}"])
