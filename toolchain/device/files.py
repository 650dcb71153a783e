"""The bundle on disk: its manifest, presets and golden prompts, and whether every file is what the manifest says."""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DeviceError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
PRESETS = "presets.json"
GOLDEN = "eval/golden.json"
ANSWERS = "eval/answers.json"
SERVER_BYTES = 256 << 20
"""Compute buffers, libraries and a short context of a small model, beside its weights."""
JSON_LIMIT_BYTES = 64 << 20
"""No manifest is longer: a device's memory is not for what claims to be one."""
MODES = ("0644", "0755")
_AGAIN = "copy the bundle again"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


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

    def answers(self) -> dict[str, Any] | None:
        """The golden prompts' recorded answers; None in a bundle that was built without. Raises DeviceError."""
        if ANSWERS not in self.manifest["files"]:
            return None
        answers = _read_json(self.root / ANSWERS)
        if not isinstance(answers, dict) or len(answers.get("answers", [])) != len(self.golden()):
            raise DeviceError(f"{ANSWERS} does not answer {GOLDEN}", hint=_AGAIN)
        return answers


def open_bundle(root: Path) -> Bundle:
    """Read the manifest of the bundle at `root`. Raises DeviceError."""
    content = _read(root / MANIFEST)
    return Bundle(root, parse_manifest(content), hashlib.sha256(content).hexdigest())


def parse_manifest(content: bytes) -> dict[str, Any]:
    """The manifest, once it is known to list plain files inside the bundle and nothing else. Raises DeviceError."""
    manifest = _json(content, MANIFEST)
    if not isinstance(manifest, dict) or "schema_version" not in manifest:
        raise DeviceError(f"{MANIFEST} is not a bundle's manifest", hint=_AGAIN)
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DeviceError(
            f"{MANIFEST} has schema version {manifest['schema_version']}; this edgectl reads {SCHEMA_VERSION}",
            hint="use the edgectl that came with the bundle",
        )
    wrong = _wrong_list(manifest.get("files")) or _wrong_name(manifest)
    if wrong:
        raise DeviceError(f"{MANIFEST} {wrong}", hint=f"it was not made by this toolchain, or was changed: {_AGAIN}")
    return manifest


def folder_name(manifest: dict[str, Any]) -> str:
    """What a bundle's folder is called."""
    return f"{manifest['name']}-{manifest['version']}-{manifest['target']['name']}"


def is_plain(path: object) -> bool:
    """Whether `path` leads nowhere but into the folder it is relative to, on any file system."""
    return isinstance(path, str) and len(path) <= 240 and all(_PART.fullmatch(part) for part in path.split("/"))


def _wrong_list(listed: object) -> str | None:
    """What is wrong with the manifest's list of files."""
    if not isinstance(listed, dict) or not listed:
        return "lists no files"
    seen: set[str] = {name.lower() for name in (MANIFEST, SUMS, SIGNATURE)}
    for path, facts in listed.items():
        if not is_plain(path):
            return f"lists {path!r}, which is not a plain path inside the bundle"
        if path.lower() in seen:
            return f"lists {path!r} twice, or as a file of another purpose (upper and lower case count as one)"
        seen.add(path.lower())
        if not isinstance(facts, dict) or set(facts) != {"sha256", "bytes", "mode"}:
            return f"says of {path} other things than sha256, bytes and mode"
        if not isinstance(facts["sha256"], str) or not _DIGEST.fullmatch(facts["sha256"]):
            return f"gives {path} no SHA-256"
        if type(facts["bytes"]) is not int or facts["bytes"] < 0:
            return f"gives {path} no size"
        if facts["mode"] not in MODES:
            return f"gives {path} the mode {facts['mode']!r}, not one of {', '.join(MODES)}"
    for path in listed:
        parents = path.lower().split("/")[:-1]
        inside = next((depth for depth in range(1, len(parents) + 1) if "/".join(parents[:depth]) in seen), None)
        if inside is not None:
            return f"lists {path!r} inside of another file"
    return None


def _wrong_name(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the names by which the manifest calls itself, the model and the programs."""
    try:
        name, model, folder = folder_name(manifest), manifest["model"]["file"], manifest["runtime"]["folder"]
    except (KeyError, TypeError):
        return "does not say what it is: name, version, target, model and runtime"
    if not is_plain(name) or "/" in name:
        return f"calls its bundle {name!r}"
    if model not in manifest["files"]:
        return f"names the model {model!r}, which is not among its files"
    return None if is_plain(folder) else f"has its programs in {folder!r}"


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
    present, links = _walk(bundle.root)
    found += [f"{path}: is a link or special file; a bundle has plain files only" for path in links]
    found += [f"{path}: missing" for path in sorted(set(expected) - present - set(links))]
    known = {*expected, MANIFEST, SUMS, SIGNATURE}
    found += [f"{path}: extra: not in the manifest" for path in sorted(present - known)]
    for path in sorted(present & set(expected)):
        problem = _problem(bundle.root / path, expected[path], read=read)
        if problem is not None:
            found.append(f"{path}: {problem}")
    if SUMS not in present:
        found.append(f"{SUMS}: missing")
    elif (bundle.root / SUMS).read_bytes() != sums_text(bundle.manifest, bundle.manifest_sha256).encode():
        found.append(f"{SUMS}: changed: it does not list what the manifest lists")
    return found


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


def _walk(root: Path) -> tuple[set[str], list[str]]:
    """Plain files below `root`, and whatever is neither file nor folder, as paths with forward slashes.

    Raises DeviceError for a folder that cannot be looked into: what lies there would go unseen.
    """

    def refuse(error: OSError) -> None:
        raise DeviceError(f"{error.filename}: cannot be read: {error.strerror}", hint="run as its owner or as root")

    plain: set[str] = set()
    other: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        for name in [*subfolders, *names]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                plain.add(path.relative_to(root).as_posix())
            elif not stat.S_ISDIR(mode):
                other.append(path.relative_to(root).as_posix())
    return plain, sorted(other)


def read_small(path: Path, limit_bytes: int) -> bytes | None:
    """A file that must be small, None when it is not there. Raises DeviceError for a link, a long one, or no access."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise DeviceError(f"{path} is a link or special file; a bundle has plain files only", hint=_AGAIN)
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit_bytes:
        raise DeviceError(f"{path} is longer than {limit_bytes >> 20} MiB: not a bundle's", hint=_AGAIN)
    return content


def _read(path: Path) -> bytes:
    content = read_small(path, JSON_LIMIT_BYTES)
    if content is None:
        raise DeviceError(f"no {path.name} in {path.parent}", hint=f"this is not a whole bundle: {_AGAIN}")
    return content


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"{name} is damaged: {error}", hint=_AGAIN) from None


def _read_json(path: Path) -> Any:
    return _json(_read(path), str(path))
