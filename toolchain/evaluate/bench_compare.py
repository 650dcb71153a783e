"""Two benchmark records → is B faster than A, by how much, and how sure is that? Reads what `edgectl bench` wrote.

Only the samples decide: medians are taken from them, and the figures that a record states beside them are not read.
The interval covers how much the samples of these two runs scatter, and nothing that stays the same within a run, such
as a warm room, a neighbour on the host, or where in memory the model came to lie: repeat the runs for that.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import PydanticKnownError, from_json

from toolchain.device.bench import SCHEMA_VERSION as RECORD_VERSION
from toolchain.errors import ArtifactError, HostError
from toolchain.settings import Settings

SCHEMA_VERSION = 1
_RATE = "tokens/s"
_MORE_IS_BETTER = {_RATE: True, "s": False}
_RECORD_HINT = "a record is results.json of the stage bench, or what `edgectl bench --json` prints"

_Bytes = Annotated[int, Field(gt=0, lt=2**63)]


class _Part(Settings):
    """What is read of a record: strict in what it needs, deaf to the rest, because records grow."""

    model_config = ConfigDict(extra="ignore")


def _not_below(value: float, info: ValidationInfo) -> float:
    if value < 0 or (value == 0 and info.data.get("unit") != _RATE):
        raise PydanticKnownError("greater_than", {"gt": 0.0})
    return value


class Metric(_Part):
    unit: str
    samples: list[Annotated[float, AfterValidator(_not_below)]] = Field(min_length=1)
    """No time is 0. A speed is where for ten seconds nothing came; nothing has a ratio to it."""


class Memory(_Part):
    peak_rss_bytes: _Bytes | None
    pss_bytes: _Bytes | None


class Device(_Part):
    board: str | None
    cpu: str | None
    governor: str | None
    power_mode: str | None = None
    l4t: str | None = None
    gpus: list[str] | None = None
    gpu_driver: str | None = None

    def conditions(self) -> dict[str, Any]:
        """What every machine has, known or not, and what this one has beside it."""
        known = {name: value for name, value in self.model_dump().items() if value}
        return {"board": self.board, "cpu": self.cpu, "governor": self.governor, **known}


class Model(_Part):
    sha256: str


class BenchRecord(_Part):
    """The part of a benchmark record that a comparison needs."""

    measured: bool
    emulated: str | None
    conclusive: bool
    inconclusive_because: list[str]
    bundle: str
    llama_cpp_commit: str
    model: Model
    threads: int
    options: dict[str, Any]
    device: Device
    memory: Memory
    metrics: dict[str, Metric]

    def conditions(self) -> dict[str, Any]:
        """What the figures were taken under, by the record's own dotted keys."""
        return {
            "bundle": self.bundle,
            "model.sha256": self.model.sha256,
            "llama_cpp_commit": self.llama_cpp_commit,
            "threads": self.threads,
            **{f"device.{name}": value for name, value in self.device.conditions().items()},
            **{f"options.{name}": value for name, value in self.options.items()},
            "measured": self.measured,
        }


def read_record(path: Path) -> BenchRecord:
    """Raises ArtifactError, with a single message for the first thing that does not fit."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file", hint=_RECORD_HINT) from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}", hint=_RECORD_HINT) from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not UTF-8 (byte {error.start})", hint=_RECORD_HINT) from None
    try:
        raw = from_json(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}", hint=_RECORD_HINT) from None
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path}: not a JSON object", hint=_RECORD_HINT)
    if "schema_version" not in raw:
        raise ArtifactError(f"{path}: no schema_version, so not a benchmark record", hint=_RECORD_HINT)
    version = raw["schema_version"]
    if type(version) is not int or version != RECORD_VERSION:
        raise ArtifactError(
            f"{path}: has schema_version {_shown(version)}, and {RECORD_VERSION} is read",
            hint="compare with the toolchain that made the bundle, or measure again with a bundle of this one",
        )
    try:
        return BenchRecord.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {_first_problem(error)}", hint=_RECORD_HINT) from None


def _first_problem(error: ValidationError) -> str:
    problem, *others = error.errors(include_url=False)
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        text = f"{where}: is missing"
    else:
        message, given = problem["msg"], problem["input"]
        got = "" if isinstance(given, dict | list) else f" (got {_shown(given)})"
        text = f"{where}: {message[:1].lower()}{message[1:]}{got}"
    return f"{text}; and {len(others)} more" if others else text


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def compare(path_a: Path, path_b: Path) -> dict[str, Any]:
    """The comparison, JSON-able. Raises ArtifactError for records that cannot be compared.

    The samples of A and of B are resampled independently of each other. Equal numbers of them invite pairing by index,
    which would be narrower; but sample 3 of A and sample 3 of B share nothing, since each run took all of its own in
    one go. Even of runs that took turns, a record does not say which samples were neighbours: schema 1 has no key for
    it, and order is not identity.
    """
    a, b = read_record(path_a), read_record(path_b)
    common = [name for name in a.metrics if name in b.metrics]
    if not common:
        of_a, of_b = (", ".join(record.metrics) or "none" for record in (a, b))
        raise ArtifactError(
            f"{path_a} and {path_b} have no metric in common: {of_a} against {of_b}",
            hint="measure both with the same --prompt-tokens and --generated-tokens",
        )
    before, after = a.conditions(), b.conditions()
    return {
        "schema_version": SCHEMA_VERSION,
        "a": _source(path_a, a),
        "b": _source(path_b, b),
        "interval": _interval_facts(),
        "metrics": [_row(name, a.metrics[name], b.metrics[name]) for name in common],
        "memory": [_memory_row(name, getattr(a.memory, name), getattr(b.memory, name)) for name in Memory.model_fields],
        "only_in_a": [name for name in a.metrics if name not in b.metrics],
        "only_in_b": [name for name in b.metrics if name not in a.metrics],
        "differs": [
            {"condition": name, "a": before.get(name), "b": after.get(name)}
            for name in before | after
            if before.get(name) != after.get(name)
        ],
        "unknown_in_both": [name for name, value in before.items() if value is None and after.get(name) is None],
    }


def _source(path: Path, record: BenchRecord) -> dict[str, Any]:
    own = ("bundle", "measured", "emulated", "conclusive", "inconclusive_because")
    return {"file": str(path), **{name: getattr(record, name) for name in own}}


def _interval_facts() -> dict[str, Any]:
    try:
        from toolchain.evaluate import bootstrap
    except ModuleNotFoundError as error:
        hint = "pip install -c constraints.txt -e '.[gguf]'"
        raise HostError(f"intervals need the package '{error.name}'", hint=hint) from None
    return {
        "method": "percentile bootstrap, each record resampled by itself",
        "confidence": bootstrap.CONFIDENCE,
        "resamples": bootstrap.RESAMPLES,
        "seed": 0,
    }


def _row(name: str, a: Metric, b: Metric) -> dict[str, Any]:
    from toolchain.evaluate.bootstrap import ratio_interval

    if a.unit != b.unit:
        raise ArtifactError(f"{name} is in {a.unit} in A and in {b.unit} in B", hint="the records cannot be compared")
    p50_a, p50_b = statistics.median(a.samples), statistics.median(b.samples)
    interval = ratio_interval(a.samples, b.samples, seed=0) if min(a.samples) > 0 else None
    low, high = interval or (None, None)
    return {
        "name": name,
        "unit": a.unit,
        "samples_a": len(a.samples),
        "samples_b": len(b.samples),
        "p50_a": p50_a,
        "p50_b": p50_b,
        "ratio": p50_b / p50_a if p50_a else None,
        "low": low,
        "high": high,
        "verdict": verdict(a.unit, interval),
    }


def verdict(unit: str, interval: Sequence[float] | None) -> str:
    """What an interval of B ÷ A says of B: "faster", "slower", or "no difference" where it holds 1.

    "undecided" without an interval; "more" or "less" for a unit of which nobody has said here which way is better.
    """
    if interval is None:
        return "undecided"
    low, high = interval
    if low <= 1 <= high:
        return "no difference"
    if unit not in _MORE_IS_BETTER:
        return "more" if low > 1 else "less"
    return "faster" if (low > 1) == _MORE_IS_BETTER[unit] else "slower"


def _memory_row(name: str, a: int | None, b: int | None) -> dict[str, Any]:
    return {"name": name, "a": a, "b": b, "ratio": None if a is None or b is None else b / a}
