"""Settings of the server that were found faster on this very machine: where they lie, and whether they may be used."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, launch, probe
from .errors import DeviceError

SCHEMA_VERSION = 1
FOLDER = launch.TUNED
FLAGS = {
    "--threads-batch": True,
    "--no-repack": False,
    "--load-mode": True,
    "--ubatch-size": True,
    "--cache-type-k": True,
    "--cache-type-v": True,
    "--flash-attn": True,
    "--n-gpu-layers": True,
    "--spec-type": True,
}
"""What tuning may add to the presets' command, and whether a value follows. A record with anything else is refused: it
could lead the server to another model, or to the network."""
_VALUE = re.compile(r"[a-z0-9_][a-z0-9_-]*", re.ASCII)
_SAME = ("board", "cpu", "arch", "logical_cpus", "physical_cores", "gpus", "gpu_driver", "l4t", "power_mode")
_MEMORY_STEP_BYTES = 256 << 20
"""Kernels keep more or less of the memory for themselves: the same machine has to be known after an update."""


@dataclass(frozen=True)
class Tuned:
    """What is changed in the presets' command, and what that was found to bring."""

    threads: int
    arguments: tuple[str, ...]
    gain: float
    """Time of a chat with the presets / with this."""

    def __str__(self) -> str:
        return " ".join(["--threads", str(self.threads), *self.arguments])


def fingerprint(facts: Mapping[str, Any]) -> str:
    """SHA-256 in hex of what the machine is, from `probe.probe()`, with its GPU's driver and its power mode.

    Its state, such as clock and load, is left out.
    """
    same = {key: facts[key] for key in _SAME}
    same["memory"] = round(facts["memory_bytes"] / _MEMORY_STEP_BYTES)
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def record_path(home: Path, bundle_id: str, device: str) -> Path:
    """The record of one bundle on one machine."""
    return home / FOLDER / f"{launch.tuned_prefix(bundle_id)}{device[:12]}.json"


def read(home: Path, bundle: files.Bundle, device: str) -> dict[str, Any] | None:
    """The record of this bundle on the machine with this fingerprint; None when there is none. Raises DeviceError."""
    path = record_path(home, bundle.id, device)
    content = files.read_small(path, files.JSON_LIMIT_BYTES)
    if content is None:
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        record = None
    wrong = _wrong(record, bundle.id, device)
    if wrong is not None:
        raise DeviceError(f"{path} {wrong}", hint="./edgectl tune --again writes it anew")
    found: dict[str, Any] = record
    return found


def _wrong(record: object, bundle_id: str, device: str) -> str | None:
    """What speaks against a record."""
    if not isinstance(record, dict) or "tuned" not in record or "conclusive" not in record:
        return "is damaged"
    if record.get("schema_version") != SCHEMA_VERSION:
        return f"has schema version {record.get('schema_version')}; this edgectl reads {SCHEMA_VERSION}"
    settings = record["tuned"]
    for part in [record] if settings is None else [record, settings]:
        if not isinstance(part, dict):
            return "is damaged"
        if (part.get("bundle"), part.get("device")) != (bundle_id, device):
            return "is of another bundle or machine"
    if settings is None:
        return None
    threads, gain, arguments = settings.get("threads"), settings.get("gain"), settings.get("arguments")
    if type(threads) is not int or not 1 <= threads <= 4096 or not isinstance(gain, float):
        return "is damaged"
    if not isinstance(arguments, list) or not all(isinstance(part, str) for part in arguments):
        return "is damaged"
    return None if flags(arguments) is not None else f"has arguments that tuning does not give: {arguments}"


def flags(arguments: Sequence[str]) -> list[str] | None:
    """The flags among `arguments`; None when there is one that tuning may not give, or a value too many or too few."""
    rest, found = list(arguments), []
    while rest:
        flag = rest.pop(0)
        if flag not in FLAGS or (FLAGS[flag] and (not rest or not _VALUE.fullmatch(rest.pop(0)))):
            return None
        found.append(flag)
    return found


def find(home: Path, bundle: files.Bundle, say: Callable[[str], None]) -> Tuned | None:
    """What was found for this bundle on this machine; a line for a record that is refused, and the presets then."""
    try:
        record = read(home, bundle, fingerprint(probe.probe()))
    except DeviceError as error:
        say(f"tuned settings are not used: {error.message}")
        return None
    if record is None and any((home / FOLDER).glob(f"{launch.tuned_prefix(bundle.id)}*.json")):
        say("tuned settings are of another machine, driver or power mode: ./edgectl tune looks for this one's")
    if record is None or record["tuned"] is None:
        return None
    settings = record["tuned"]
    return Tuned(settings["threads"], tuple(settings["arguments"]), settings["gain"])
