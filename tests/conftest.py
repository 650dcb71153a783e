"""Every layer is counted in the summary, and in CI a skipped test is a failure unless it needs a GPU."""

import os
from pathlib import Path

import pytest

# Without a GPU its kernels are interpreted; Triton asks for this when it is first imported, whoever does that.
if not any(Path(sign).exists() for sign in ("/proc/driver/nvidia/gpus", "/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"

LAYERS = ("unit", "stages", "device", "containers", "end_to_end")
_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The quick layers first."""
    items.sort(key=lambda item: LAYERS.index(_layer(item.path)))


def _layer(path: Path) -> str:
    return path.relative_to(_TESTS).parts[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per layer, and the reason where a layer did not run."""
    counts = {layer: {"passed": 0, "failed": 0, "error": 0, "skipped": 0} for layer in LAYERS}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[Path(report.nodeid).parts[1]][outcome] += 1
    terminalreporter.section("layers")
    for layer, found in counts.items():
        shown = ", ".join(f"{number} {outcome}" for outcome, number in found.items() if number)
        terminalreporter.line(f"{layer}: {shown or 'not selected'}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI nothing is skipped unseen: a missing tool is a broken set-up, not a reason to pass."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and isinstance(reporter, pytest.TerminalReporter):
        skipped = [report for report in reporter.stats.get("skipped", []) if "gpu" not in report.keywords]
        if skipped and session.exitstatus == pytest.ExitCode.OK:
            reporter.line(f"{len(skipped)} tests were skipped, and CI allows that only to those that need a GPU")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
