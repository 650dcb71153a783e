"""A comparison of two benchmark records → a table and what to know before believing it, as plain text."""

import re
from collections.abc import Mapping
from typing import Any

from toolchain.evaluate.ledger_text import markdown

_FEW = 5
"""Samples below which the interval excludes 1 far too often: see docs/measuring.md."""


def render(result: Mapping[str, Any]) -> str:
    confidence = f"{100 * result['interval']['confidence']:g} % interval"
    head = ("", "unit", "p50 of A", "p50 of B", "B ÷ A", confidence, "B is")
    rows = [_metric(row) for row in result["metrics"]] + [_memory(row) for row in result["memory"]]
    sections = [
        [f"{who.upper()}: {result[who]['file']}, {_value(result[who]['bundle'])}" for who in ("a", "b")],
        [markdown((head, rows))],
        [*_notes(result), *_only(result)],
        _differences(result),
        [line for who in ("a", "b") for line in _doubts(who.upper(), result[who])],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _metric(row: Mapping[str, Any]) -> tuple[str, ...]:
    milli = row["unit"] == "s"
    scale, unit = (1000, "ms") if milli else (1, row["unit"])
    interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    name = row["name"].removesuffix("_s") if milli else row["name"]
    figures = (_figure(row[key] * scale) for key in ("p50_a", "p50_b"))
    return name, unit, *figures, _ratio(row["ratio"]), interval, row["verdict"]


def _memory(row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = ("unknown" if row[who] is None else _figure(row[who] / 2**20) for who in ("a", "b"))
    return row["name"].removesuffix("_bytes"), "MiB", *figures, _ratio(row["ratio"]), "", ""


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    interval = result["interval"]
    notes = [
        f"Intervals: {interval['method']}, {interval['resamples']} resamples. No difference: the interval holds 1.",
        "They cover the scatter within these two runs, and not what changes from one run to the next.",
    ]
    fewest = min(min(row["samples_a"], row["samples_b"]) for row in result["metrics"])
    if fewest < _FEW:
        notes.append(
            f"A metric has only {fewest} sample{'s' * (fewest > 1)}: below {_FEW}, intervals are too narrow, and a "
            "single sample has none."
        )
    return notes


def _only(result: Mapping[str, Any]) -> list[str]:
    found = ((who, result[f"only_in_{who}"]) for who in ("a", "b"))
    return [f"Only in {who.upper()}: {', '.join(names)}" for who, names in found if names]


def _differences(result: Mapping[str, Any]) -> list[str]:
    lines = ["Conditions that differ:"] + [
        f"- {item['condition']}: {_value(item['a'])} in A, {_value(item['b'])} in B" for item in result["differs"]
    ]
    if not result["differs"]:
        lines = ["Conditions: bundle, model, llama.cpp, threads, device and options do not differ."]
    if result["unknown_in_both"]:
        lines.append(f"Unknown in both, so perhaps different: {', '.join(result['unknown_in_both'])}")
    return lines


def _value(value: Any) -> str:
    """A digest is cut, and a fact that a record does not have is called unknown."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    digest = re.fullmatch(r"((?:sha256:)?[0-9a-f]{12})[0-9a-f]{20,}", str(value))
    return f"{digest[1]}…" if digest else str(value)


def _doubts(name: str, source: Mapping[str, Any]) -> list[str]:
    lines = (
        [] if source["measured"] else [f"{name} was NOT MEASURED ON THE DEVICE: {source['emulated'] or 'no reason'}"]
    )
    if source["conclusive"]:
        return lines or [f"{name} calls itself conclusive."]
    reasons = source["inconclusive_because"] or ["it gives no reason"]
    return lines + [f"{name} calls itself inconclusive: {reason}" for reason in reasons]
