"""The bundle on disk: its manifest, presets and golden prompts, and whether every file is what the manifest says."""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DeviceError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
PRESETS = "presets.json"
GOLDEN = "eval/golden.json"
SERVER_BYTES = 256 << 20
"""Compute buffers, libraries and a short context of a small model, beside its weights."""
_AGAIN = "copy the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and what its manifest says."""

    root: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.manifest["bundle_id"])

    @property
    def model(self) -> Path:
        return self.root / str(self.manifest["model"]["file"])

    @property
    def programs(self) -> Path:
        """The folder of llama-server, llama-bench and their libraries."""
        return self.root / str(self.manifest["runtime"]["folder"])

    def presets(self) -> dict[str, Any]:
        """How the server is started. Raises DeviceError."""
        presets = _read_json(self.root / PRESETS)
        if not isinstance(presets, dict):
            raise DeviceError(f"{PRESETS} is not an object", hint=_AGAIN)
        return presets

    def golden(self) -> list[dict[str, Any]]:
        """Prompts with the ids they must be rendered to. Raises DeviceError."""
        golden = _read_json(self.root / GOLDEN)
        if not isinstance(golden, list):
            raise DeviceError(f"{GOLDEN} is not a list", hint=_AGAIN)
        return golden


def open_bundle(root: Path) -> Bundle:
    """Read the manifest of the bundle at `root`. Raises DeviceError."""
    manifest = _read_json(root / MANIFEST)
    if not isinstance(manifest, dict) or "schema_version" not in manifest:
        raise DeviceError(f"{MANIFEST} is not a bundle's manifest", hint=_AGAIN)
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DeviceError(
            f"{MANIFEST} has schema version {manifest['schema_version']}; this edgectl reads {SCHEMA_VERSION}",
            hint="use the edgectl that came with the bundle",
        )
    return Bundle(root, manifest)


def bundle_id(manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest without its id; it lists every file's digest, so any change of a byte changes it."""
    rest = {key: value for key, value in manifest.items() if key != "bundle_id"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sums_text(root: Path, manifest: dict[str, Any]) -> str:
    """The text of SHA256SUMS, as `sha256sum -c` reads it: every file of the bundle but itself."""
    digests = {path: str(facts["sha256"]) for path, facts in manifest["files"].items()}
    digests[MANIFEST] = sha256(root / MANIFEST)
    return "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))


def problems(bundle: Bundle) -> list[str]:
    """What differs from the manifest, one line for each file; empty when nothing does."""
    expected: dict[str, dict[str, Any]] = bundle.manifest["files"]
    found: list[str] = []
    if bundle_id(bundle.manifest) != bundle.id:
        found.append(f"{MANIFEST}: changed: its content does not give the id it states")
    present, links = _walk(bundle.root)
    found += [f"{path}: is a link or special file; a bundle has plain files only" for path in links]
    found += [f"{path}: missing" for path in sorted(set(expected) - present - set(links))]
    known = {*expected, MANIFEST, SUMS}
    found += [f"{path}: extra: not in the manifest" for path in sorted(present - known)]
    for path in sorted(present & set(expected)):
        facts = expected[path]
        file = bundle.root / path
        status = file.stat()
        try:
            if status.st_size != facts["bytes"]:
                found.append(f"{path}: changed: {status.st_size} bytes, the manifest says {facts['bytes']}")
            elif sha256(file) != facts["sha256"]:
                found.append(f"{path}: changed: SHA-256 differs")
            elif int(facts["mode"], 8) & stat.S_IXUSR and not os.access(file, os.X_OK):
                found.append(f"{path}: not executable: chmod +x {path}")
        except OSError as error:
            found.append(f"{path}: cannot be read: {error.strerror}")
    if SUMS not in present:
        found.append(f"{SUMS}: missing")
    elif (bundle.root / SUMS).read_text(errors="replace") != sums_text(bundle.root, bundle.manifest):
        found.append(f"{SUMS}: changed: it does not list what the manifest lists")
    return found


def _walk(root: Path) -> tuple[set[str], list[str]]:
    """Plain files below `root`, and whatever is neither file nor folder, as paths with forward slashes."""
    plain: set[str] = set()
    other: list[str] = []
    for folder, subfolders, names in os.walk(root):
        for name in [*subfolders, *names]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                plain.add(path.relative_to(root).as_posix())
            elif not stat.S_ISDIR(mode):
                other.append(path.relative_to(root).as_posix())
    return plain, sorted(other)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeviceError(f"no {path.name} in {path.parent}", hint=f"this is not a whole bundle: {_AGAIN}") from None
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DeviceError(f"{path} is damaged: {error}", hint=_AGAIN) from None
