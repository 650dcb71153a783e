"""What the run showed: ledger, gates and device figures, as report.json, report.md and text for the screen."""

import json
import platform
from pathlib import Path
from typing import Any

from toolchain.artifact import Artifact, write_atomic
from toolchain.errors import ArtifactError
from toolchain.evaluate import compare_text
from toolchain.evaluate.ledger_text import Table, gain, gates, held_out, markdown, quantization, table
from toolchain.runner import Pipeline

SCHEMA_VERSION = 2


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
        held_out(ledger),
        markdown(table(ledger)),
        gain(ledger["gain"]),
        gates(data["gates"]),
        quantization(ledger["quantization"], data["speed"]),
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
    parts.append("## Time\n\n" + markdown(_time_table(data["stages"])))
    return "\n\n".join(part for part in parts if part) + "\n"


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
