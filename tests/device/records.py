"""A benchmark record, figure by figure: which of them say whether they were measured on the device."""

from collections.abc import Iterator
from typing import Any

CONDITIONS = {
    "schema_version",
    "model",
    "seconds",
    "threads",
    "options",
    "device",
    "device_after",
    "throttled",
    "foreign_cpu_share",
}
"""Parts of a record that say what was measured, and under what."""


def figures(record: dict[str, Any]) -> dict[str, object]:
    """Path of every number that is no condition → `measured` of the nearest part around it; None where none says."""
    parts = {name: part for name, part in record.items() if name not in CONDITIONS}
    return {path: mark for name, part in parts.items() for path, mark in _walk(name, part, None)}


def _walk(path: str, part: object, mark: object) -> Iterator[tuple[str, object]]:
    if isinstance(part, dict):
        mark = part.get("measured", mark)
        for name, inner in part.items():
            yield from _walk(f"{path}.{name}", inner, mark)
    elif isinstance(part, list):
        for number, inner in enumerate(part):
            yield from _walk(f"{path}.{number}", inner, mark)
    elif isinstance(part, int | float) and not isinstance(part, bool):
        yield path, mark
