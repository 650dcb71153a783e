"""What the run showed: ledger, gates and device figures, as report.json, report.md and text for the screen."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.artifact import Artifact, write_atomic
from toolchain.errors import ArtifactError
from toolchain.evaluate import compare_text
from toolchain.evaluate.gates import JUDGED_BY
from toolchain.runner import Pipeline

SCHEMA_VERSION = 2
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def write(pipeline: Pipeline) -> tuple[str, Path, Path]:
    """Write work/reports/<recipe>/report.{json,md}; the text for the screen and both paths come back.

    Raises ArtifactError when `evaluate` is not done: there is nothing to report.
    """
    data = collect(pipeline)
    folder = pipeline.work / "reports" / pipeline.recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    as_data, markdown = folder / "report.json", folder / "report.md"
    write_atomic(as_data, json.dumps(data, indent=1) + "\n")
    text = render(data)
    write_atomic(markdown, text)
    allocation = data["ledger"]["quantization"]["allocation"]
    if "held_out" in allocation:
        from toolchain.evaluate import pictures

        pictures.write(allocation, folder)
    return text, markdown, as_data


def collect(pipeline: Pipeline) -> dict[str, Any]:
    """Everything the report says, from the artifacts' own files and manifests."""
    artifacts = pipeline.artifacts()
    if "evaluate" not in artifacts:
        hint = "run `toolchain run`; `toolchain plan` shows what is left"
        raise ArtifactError("nothing to report: evaluate is not done", hint=hint)
    ledger = _read(artifacts["evaluate"], "ledger.json")
    searched = "held_out" in ledger["quantization"]["allocation"]
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": pipeline.recipe.name,
        "version": pipeline.recipe.version,
        "ledger": ledger,
        "speed": _read(artifacts["quantize"], "speed.json") if searched else None,
        "compare": _read_if(artifacts, "compare", "compare.json"),
        "compare_timing": _read_if(artifacts, "compare", "timing.json"),
        "gates": [gate.as_dict() for gate in pipeline.gates()],
        "targets": {
            step.target.name: {
                "bundle": str(artifacts[step.name].path),
                "elsewhere": step.target.arch != platform.machine(),
                "smoke": _read_if(artifacts, f"smoke[{step.target.name}]", "smoke.json"),
                "bench": _read_if(artifacts, f"bench[{step.target.name}]", "results.json"),
            }
            for step in pipeline.steps
            if step.stage.name == "bundle" and step.target is not None and step.name in artifacts
        },
        "stages": {
            name: {
                "fingerprint": artifact.manifest.fingerprint,
                "digest": artifact.digest,
                "seconds": artifact.manifest.seconds,
                "started": artifact.manifest.started,
                "metrics": artifact.manifest.metrics,
            }
            for name, artifact in artifacts.items()
        },
    }


def _read(artifact: Artifact, name: str) -> Any:
    return json.loads((artifact.path / name).read_text(encoding="utf-8"))


def _read_if(artifacts: dict[str, Artifact], step: str, name: str) -> Any:
    return _read(artifacts[step], name) if step in artifacts else None


def render(data: dict[str, Any]) -> str:
    """Markdown that also reads well as plain text."""
    ledger = data["ledger"]
    parts = [
        f"# {data['recipe']} {data['version']}: what was gained and lost",
        _held_out(ledger),
        _markdown(_ledger_table(ledger)),
        _gain(ledger["gain"]),
        _gates(data["gates"]),
        _quantization(ledger["quantization"], data["speed"]),
    ]
    if data["compare"] is not None:
        # One level down: its title is a part of this report.
        parts.append(compare_text.render(data["compare"], data["compare_timing"]).replace("# ", "## ").strip())
    for target, found in data["targets"].items():
        parts.append(f"## {target}\n\nBundle: {found['bundle']}")
        if found["elsewhere"]:
            parts.append(
                "Not tried and not measured: it is for another processor. On the device: `./edgectl smoke`, then "
                "`./edgectl bench`."
            )
        if found["smoke"] is not None:
            parts.append(_smoke(found["smoke"]))
        if found["bench"] is not None:
            parts.append(_bench(found["bench"]))
    parts.append("## Time\n\n" + _markdown(_time_table(data["stages"])))
    return "\n\n".join(part for part in parts if part) + "\n"


def _held_out(ledger: dict[str, Any]) -> str:
    text = (
        f"Held out: {ledger['held_out_rows']} questions, {ledger['answer_tokens']} answer tokens, vocabulary "
        f"{ledger['vocabulary']}. KL and cross-entropy in nats per answer token at temperature 1."
    )
    if ledger["gain"]["judged_by"] == "kl_to_teacher":
        return text
    found = ledger["tokenizers"]
    why = found["prompts"] or f"the verdict on the tokenizers is '{found['verdict']}'"
    return f"{text} KL to the teacher is undefined: {why}. What counts is the cross-entropy of the held-out answers."


def _ledger_table(ledger: dict[str, Any]) -> Table:
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


def _gain(gain: dict[str, Any]) -> str:
    name = JUDGED_BY[gain["judged_by"]]
    text = f"Distillation lowered the {name}" if gain["difference"] > 0 else f"Distillation did not lower the {name}"
    text += f": {gain['before']:.4f} before, {gain['after']:.4f} after, before − after {gain['difference']:.4f}"
    if gain["low"] is None:
        return f"{text} (a single question: no interval)."
    interval = f"{100 * gain['confidence']:.0f} % interval {gain['low']:.4f} to {gain['high']:.4f}"
    return f"{text} ({interval}: paired bootstrap over the held-out questions, {gain['resamples']} resamples)."


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _gates(gates: list[dict[str, Any]]) -> str:
    lines = [
        f"- {'passed' if gate['passed'] else 'FAILED'}: {gate['name']} = {gate['value']:.3g} (limit {gate['limit']:g})"
        for gate in gates
    ]
    return "## Gates\n\n" + "\n".join(lines)


def _quantization(facts: dict[str, Any], speed: dict[str, Any] | None) -> str:
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
    return text + _error_aware(allocation, speed or {"decode": {}}) if "held_out" in allocation else text


def _error_aware(allocation: dict[str, Any], speed: dict[str, Any]) -> str:
    decode, held_out = speed["decode"], allocation["held_out"]
    change, search = held_out["change"], allocation["search"]
    taken = "The error-aware file is the one that is shipped" if allocation["taken"] else "Stock is shipped"
    interval = "" if change["low"] is None else f" [{change['low']:+.5f}, {change['high']:+.5f}]"
    head = ("form", "MB", "bits per weight", "KL to 16-bit", "99th percentile", "same top", "perplexity", "F1",
            "decode, tokens/s", "÷ stock")  # fmt: skip
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
            *(_speed(decode[name]) if name in decode else ("", "")),
        )
        for name, form in held_out["forms"].items()
    ]
    text = (
        f"{taken}: KL to 16-bit {change['difference']:+.5f}{interval} against stock with the same importance matrix "
        f"({change['share']:+.1%}), {held_out['rows']} held-out rows, {held_out['answer_tokens']} tokens, in nats per "
        f"token. F1 is that of greedy answers to the teacher's, on {held_out['answered']} of them. Speed is this "
        f"host's, in turns: median, least to most. {search['trials']} whole plans were measured. plan.txt names every "
        "tensor's type; pictures lie beside this report."
    )
    return f"\n\n{text}\n\n{_markdown((head, rows))}"


def _speed(found: dict[str, Any]) -> tuple[str, str]:
    return f"{found['median']:.1f} ({found['least']:.1f} to {found['most']:.1f})", f"{found['ratio']:.3f}"


def _smoke(smoke: dict[str, Any]) -> str:
    checks = smoke["checks"]
    good = sum(check["ok"] for check in checks)
    lines = [f"- {check['name']}: {check['detail']}" for check in checks]
    return f"Smoke: {good} of {len(checks)} checks passed.\n\n" + "\n".join(lines)


def _bench(bench: dict[str, Any]) -> str:
    from toolchain.device import bench as device_bench

    return "Bench:\n\n```\n" + device_bench.table(bench).rstrip() + "\n```"


def _time_table(stages: dict[str, Any]) -> Table:
    rows = [(name, f"{stage['seconds']:.1f}", stage["metrics"].get("summary", "")) for name, stage in stages.items()]
    total = sum(stage["seconds"] for stage in stages.values())
    return ("stage", "s", "result"), [*rows, ("all", f"{total:.1f}", "")]


def _markdown(table: Table) -> str:
    """A Markdown table whose columns line up, so that it reads as plain text too."""
    head, rows = table
    widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)
