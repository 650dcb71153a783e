"""The bundle on disk: its manifest, presets and golden prompts, and whether every file is what the manifest says."""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DeviceError
from .manifest import (
    AGAIN,
    JSON_LIMIT_BYTES,
    MANIFEST,
    PRESETS,
    SCHEMA_VERSION,
    SIGNATURE,
    SUMS,
    folder_name,
    is_plain,
    parse_manifest,
    read_json,
    read_manifest,
    read_presets,
    read_small,
)

__all__ = [
    "JSON_LIMIT_BYTES",
    "MANIFEST",
    "PRESETS",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "SUMS",
    "folder_name",
    "is_plain",
    "parse_manifest",
    "read_small",
]
"""Of the manifest, for those who have a bundle's files in hand: this module is the door to both."""

GOLDEN = "eval/golden.json"
ANSWERS = "eval/answers.json"
SERVER_BYTES = 256 << 20
"""Compute buffers and libraries, beside the weights and the context's keys and values."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and what its manifest says."""

    root: Path
    manifest: dict[str, Any]
    manifest_sha256: str
    """Of the manifest's bytes as they were read, in hex."""

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

    @property
    def wanted_bytes(self) -> int:
        """Memory for the model, its whole context and the server."""
        return int(self.manifest["model"]["bytes"]) + int(self.manifest["model"]["cache_bytes"]) + SERVER_BYTES

    def presets(self) -> dict[str, Any]:
        """How the server is started. Raises DeviceError."""
        return read_presets(str(self.root))

    def golden(self) -> list[dict[str, Any]]:
        """Prompts with the ids they must be rendered to. Raises DeviceError."""
        golden = read_json(str(self.root / GOLDEN))
        if not isinstance(golden, list):
            raise DeviceError(f"{GOLDEN} is not a list", hint=AGAIN)
        return golden

    def answers(self) -> dict[str, Any] | None:
        """The golden prompts' recorded answers; None in a bundle that was built without. Raises DeviceError."""
        if ANSWERS not in self.manifest["files"]:
            return None
        answers = read_json(str(self.root / ANSWERS))
        if not isinstance(answers, dict) or len(answers.get("answers", [])) != len(self.golden()):
            raise DeviceError(f"{ANSWERS} does not answer {GOLDEN}", hint=AGAIN)
        return answers


def open_bundle(root: Path) -> Bundle:
    """Read the manifest of the bundle at `root`. Raises DeviceError."""
    return bundle_of(root, *read_manifest(str(root)))


def bundle_of(root: Path, manifest: dict[str, Any], content: bytes) -> Bundle:
    """The bundle whose manifest was read."""
    return Bundle(root, manifest, hashlib.sha256(content).hexdigest())


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


def sums_text(manifest: dict[str, Any], manifest_sha256: str) -> str:
    """The text of SHA256SUMS, as `sha256sum -c` reads it: every file of the bundle but itself and its signature."""
    digests = {path: str(facts["sha256"]) for path, facts in manifest["files"].items()}
    digests[MANIFEST] = manifest_sha256
    return "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))


def problems(bundle: Bundle, *, read: bool = True) -> list[str]:
    """What differs from the manifest, one line for each file; empty when nothing does.

    Without `read` the digests of the manifest's files are left to the caller, who reads them anyway.
    """
    expected: dict[str, dict[str, Any]] = bundle.manifest["files"]
    found: list[str] = []
    if bundle_id(bundle.manifest) != bundle.id:
        found.append(f"{MANIFEST}: changed: its content does not give the id it states")
    present, links, folders = _walk(bundle.root)
    found += [f"{_shown(path)}: is a link or special file; a bundle has plain files only" for path in links]
    found += [f"{path}: missing" for path in sorted(set(expected) - present - set(links))]
    known = {*expected, MANIFEST, SUMS, SIGNATURE}
    found += [f"{_shown(path)}: extra: not in the manifest" for path in sorted(present - known)]
    needed = {parent.as_posix() for path in expected for parent in PurePosixPath(path).parents}
    found += [f"{_shown(path)}: extra: a folder that the manifest does not need" for path in sorted(folders - needed)]
    for path in sorted(present & set(expected)):
        problem = _problem(bundle.root / path, expected[path], read=read)
        if problem is not None:
            found.append(f"{path}: {problem}")
    if SUMS not in present:
        found.append(f"{SUMS}: missing")
    elif (bundle.root / SUMS).read_bytes() != sums_text(bundle.manifest, bundle.manifest_sha256).encode():
        found.append(f"{SUMS}: changed: it does not list what the manifest lists")
    return found


def _shown(path: str) -> str:
    """A name that the manifest does not vouch for, on one line and in letters that can be printed."""
    return path if path.isprintable() else ascii(path)


def _problem(file: Path, facts: dict[str, Any], *, read: bool) -> str | None:
    try:
        status = file.stat()
        if status.st_size != facts["bytes"]:
            return f"changed: {status.st_size} bytes, the manifest says {facts['bytes']}"
        if read and sha256(file) != facts["sha256"]:
            return "changed: SHA-256 differs"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if int(facts["mode"], 8) & stat.S_IXUSR and not os.access(file, os.X_OK):
        return f"not executable: chmod +x {file.name}"
    return None


def _walk(root: Path) -> tuple[set[str], list[str], set[str]]:
    """Plain files below `root`, whatever is neither file nor folder, and folders, as paths with forward slashes.

    Raises DeviceError for a folder that cannot be looked into: what lies there would go unseen.
    """

    def refuse(error: OSError) -> None:
        raise DeviceError(f"{error.filename}: cannot be read: {error.strerror}", hint="run as its owner or as root")

    plain: set[str] = set()
    other: list[str] = []
    folders: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        for name in [*subfolders, *names]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                plain.add(path.relative_to(root).as_posix())
            elif stat.S_ISDIR(mode):
                folders.add(path.relative_to(root).as_posix())
            else:
                other.append(path.relative_to(root).as_posix())
    return plain, sorted(other), folders
