"""Try and measure a bundle on this host the way a device would: its edgectl, its files, nothing of ours."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.errors import ExternalToolError, GateError
from toolchain.recipe import Bench
from toolchain.reporter import Reporter, bar


def smoke(bundle: Path, *, out: Path, report: Reporter) -> dict[str, Any]:
    """Run the bundle's smoke test from a copy of it, so that nothing can lean on where it was built; writes smoke.json.

    Raises GateError that names the checks that failed.
    """
    result = out / "smoke.json"
    with bar(report, "smoke", total=None, unit="check"), tempfile.TemporaryDirectory(dir=out) as elsewhere:
        copy = Path(shutil.copytree(bundle, Path(elsewhere) / "copy"))
        failure: ExternalToolError | None = None
        try:
            _edgectl(copy, ["smoke", "--json"], out=out, stdout=result, report=report)
        except ExternalToolError as error:
            failure = error
        record = _read(result, failure)
    failed = [f"{check['name']}: {check['detail']}" for check in record["checks"] if not check["ok"]]
    if failed:
        raise GateError(f"the bundle failed {len(failed)} smoke checks: " + "; ".join(failed))
    if failure is not None:
        raise failure
    return {"summary": f"{len(record['checks'])} checks passed"}


def bench(settings: Bench, bundle: Path, *, out: Path, report: Reporter) -> dict[str, Any]:
    """Run the bundle's bench on this machine; writes results.json."""
    result = out / "results.json"
    options = [
        *("--repetitions", str(settings.repetitions)),
        *("--cold-starts", str(settings.cold_starts)),
        *("--prompt-tokens", str(settings.prompt_tokens)),
        *("--generated-tokens", str(settings.generated_tokens)),
        *("--depth", str(settings.depth)),
        *("--clients", ",".join(map(str, settings.clients))),
        *("--sustained", str(settings.sustained_minutes)),
        *("--cool-down", str(settings.cool_down_s)),
    ]
    with bar(report, "bench", total=None, unit="part"):
        _edgectl(bundle, ["bench", "--json", *options], out=out, stdout=result, report=report)
    metrics = _read(result, None)["metrics"]
    shown = [
        f"{metrics[name]['p50']:.1f} tokens/s {label}"
        for name, label in (
            (f"pp{settings.prompt_tokens}_tps", "prefill"),
            (f"tg{settings.generated_tokens}_tps", "decode"),
        )
        if name in metrics
    ]
    return {"summary": ", ".join(shown)}


def _edgectl(bundle: Path, arguments: list[str], *, out: Path, stdout: Path, report: Reporter) -> None:
    """`python3 -I -S edgectl …` with an empty environment, by the interpreter below our virtual environment."""
    python = getattr(sys, "_base_executable", sys.executable)
    env = ["env", "-i", "PATH=/usr/bin:/bin", "HOME=/nonexistent", "LANG=C.UTF-8"]
    log = out / "logs" / "edgectl.log"
    said: list[str] = []

    def on_line(line: str) -> None:
        said.append(line)
        report.line(line)

    argv = [*env, python, "-I", "-S", str(bundle / "edgectl"), *arguments]
    try:
        process.run(argv, log=log, stdout=stdout, on_line=on_line)
    except ExternalToolError as error:
        reasons = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        if reasons:
            raise ExternalToolError(f"edgectl {arguments[0]}: {reasons[-1]}", hint=f"full output: {log}") from error
        raise


def _read(result: Path, failure: ExternalToolError | None) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except ValueError:
        raise failure or ExternalToolError(f"edgectl wrote no JSON: {result}") from None
    return record
