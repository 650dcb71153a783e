"""ledger.json → Markdown that also reads as plain text: for the report and for a bundle's model card."""

from collections.abc import Sequence
from typing import Any

from toolchain.evaluate.gates import JUDGED_BY

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def held_out(ledger: dict[str, Any]) -> str:
    text = (
        f"Held out: {ledger['held_out_rows']} questions, {ledger['answer_tokens']} answer tokens, vocabulary "
        f"{ledger['vocabulary']}. KL and cross-entropy in nats per answer token at temperature 1."
    )
    if ledger["gain"]["judged_by"] == "kl_to_teacher":
        return text
    found = ledger["tokenizers"]
    why = found["prompts"] or f"the verdict on the tokenizers is '{found['verdict']}'"
    return f"{text} KL to the teacher is undefined: {why}. What counts is the cross-entropy of the held-out answers."


def table(ledger: dict[str, Any]) -> Table:
    by_kl = ledger["gain"]["judged_by"] == "kl_to_teacher"
    judged = ("perplexity", "KL to teacher", "top-1") if by_kl else ("cross-entropy", "perplexity")
    head = ("form", "parameters", "MB", *judged, "KL to the row before")
    rows = [
        (
            row["name"],
            _millions(row["parameters"])
            + (f" + {_millions(row['adapter_parameters'])}" if row["adapter_parameters"] else ""),
            f"{row['bytes'] / 1e6:.1f}",
            *(_judged_by_kl(row) if by_kl else (f"{row['cross_entropy']:.4f}", f"{row['perplexity']:.3f}")),
            "" if row["kl_to_previous"] is None else f"{row['kl_to_previous']:.2e}",
        )
        for row in ledger["rows"]
    ]
    return head, rows


def _judged_by_kl(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['perplexity']:.3f}", f"{row['kl_to_teacher']:.4f}", f"{100 * row['top1_agreement']:.1f} %"


def gain(gain: dict[str, Any]) -> str:
    name = JUDGED_BY[gain["judged_by"]]
    text = f"Distillation lowered the {name}" if gain["difference"] > 0 else f"Distillation did not lower the {name}"
    text += f": {gain['before']:.4f} before, {gain['after']:.4f} after, before − after {gain['difference']:.4f}"
    if gain["low"] is None:
        return f"{text} (a single question: no interval)."
    interval = f"{100 * gain['confidence']:.0f} % interval {gain['low']:.4f} to {gain['high']:.4f}"
    return f"{text} ({interval}: paired bootstrap over the held-out questions, {gain['resamples']} resamples)."


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def gates(gates: list[dict[str, Any]]) -> str:
    lines = [
        f"- {'passed' if gate['passed'] else 'FAILED'}: {gate['name']} = {gate['value']:.3g} (limit {gate['limit']:g})"
        for gate in gates
    ]
    return "## Gates\n\n" + "\n".join(lines)


def quantization(facts: dict[str, Any], speed: dict[str, Any] | None) -> str:
    types = ", ".join(f"{count} × {kind}" for kind, count in sorted(facts["tensor_types"].items()))
    stored = f"{facts['file_type']}: {facts['bits_per_weight']:.2f} bits per weight as stored"
    text = f"## Quantization\n\n{stored}. Tensors: {types}."
    fallbacks = facts["fallbacks"]
    if fallbacks:
        kinds: dict[str, int] = {}
        for item in fallbacks:
            # llama-quantize picks another type for output and embeddings without saying which it wanted.
            change = f"{item['wanted'] or 'output or embeddings'} → {item['got']}"
            kinds[change] = kinds.get(change, 0) + 1
        listed = ", ".join(f"{count} × {change}" for change, count in sorted(kinds.items()))
        text += f" Fell back to another type, since their rows are not divisible by 256: {listed}."
    allocation = facts["allocation"]
    return text + _error_aware(allocation, speed or {}) if "held_out" in allocation else text


def _error_aware(allocation: dict[str, Any], speed: dict[str, Any]) -> str:
    held_out = allocation["held_out"]
    change, search = held_out["change"], allocation["search"]
    taken = "The error-aware file is the one that is shipped" if allocation["taken"] else "Stock is shipped"
    interval = "" if change["low"] is None else f" [{change['low']:+.5f}, {change['high']:+.5f}]"
    head = ("form", "MB", "bits per weight", "KL to 16-bit", "99th percentile", "same top", "perplexity", "F1",
            *(f"{kind}, tokens/s (÷ stock)" for kind in ("prefill", "decode")))  # fmt: skip
    rows = [
        (
            name,
            f"{form['file_bytes'] / 1e6:.2f}",
            f"{form['bits_per_weight']:.3f}",
            f"{form['kl']:.5f}",
            f"{form['kl_p99']:.4f}",
            f"{form['same_top']:.2%}",
            f"{form['perplexity']:.4f}",
            f"{form['answer_f1']:.3f}",
            *(_speed(speed.get(kind, {}).get(name)) for kind in ("prefill", "decode")),
        )
        for name, form in held_out["forms"].items()
    ]
    text = (
        f"{taken}: KL to 16-bit {change['difference']:+.5f}{interval} against stock with the same importance matrix "
        f"({change['share']:+.1%}), {held_out['rows']} held-out rows, {held_out['answer_tokens']} tokens, in nats per "
        f"token. F1 is that of greedy answers to the teacher's, on {held_out['answered']} of them. Speed is this "
        f"host's, in turns: medians, and the median of each round's ratio. {search['trials']} whole plans were "
        "measured. plan.txt names every tensor's type; pictures lie beside this report."
    )
    return f"\n\n{text}\n\n{markdown((head, rows))}"


def _speed(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['median']:.1f} ({found['ratio']:.3f})"


def markdown(table: Table) -> str:
    """A Markdown table whose columns line up, so that it reads as plain text too."""
    head, rows = table
    widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)
