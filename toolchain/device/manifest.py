"""What a bundle's JSON files may say. Loaded before the server's spawn: see launch.py."""

from __future__ import annotations

import os
import stat

from .errors import DeviceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
PRESETS = "presets.json"
JSON_LIMIT_BYTES = 64 << 20
"""No manifest is longer: a device's memory is not for what claims to be one."""
MODES = ("0644", "0755")
AGAIN = "copy the bundle again"
_MOST_BYTES = 1 << 50
_TEXT, _NUMBER, _LIST = "a text", "a whole number", "a list of texts"
_FACTS = {
    "": {"bundle_id": _TEXT, "name": _TEXT, "version": _TEXT},
    "target": {"name": _TEXT, "arch": _TEXT},
    "runtime": {
        "folder": _TEXT,
        "backend": _TEXT,
        "glibc_needed": _TEXT,
        "segment_alignment": _NUMBER,
        "device_libraries": _LIST,
        "flags": _LIST,
    },
    "model": {"file": _TEXT, "bytes": _NUMBER, "cache_bytes": _NUMBER, "context": _NUMBER, "parallel": _NUMBER},
}
"""What is read on the device, and of which kind it must be."""
_HEX = frozenset("0123456789abcdef")
_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_REST = _FIRST | frozenset(".+-")
_BLANK = " \t\n\r"


def read_manifest(root: str) -> tuple[dict[str, Any], bytes]:
    """The manifest of the bundle at `root`, and its bytes. Raises DeviceError."""
    content = _read(f"{root}/{MANIFEST}")
    return parse_manifest(content), content


def read_presets(root: str) -> dict[str, Any]:
    """How the programs are started. Raises DeviceError."""
    presets = read_json(f"{root}/{PRESETS}")
    server = presets.get("server") if isinstance(presets, dict) else None
    if (
        not isinstance(server, dict)
        or not _is_of(_LIST, server.get("argv"))
        or type(server.get("ready_timeout_s")) not in (int, float)
    ):
        raise DeviceError(f"{PRESETS} does not say how the server is started", hint=AGAIN)
    return dict(presets)


def parse_manifest(content: bytes) -> dict[str, Any]:
    """The manifest, once it is known to list plain files inside the bundle and nothing else. Raises DeviceError."""
    manifest = parse_json(content, MANIFEST)
    if not isinstance(manifest, dict) or "schema_version" not in manifest:
        raise DeviceError(f"{MANIFEST} is not a bundle's manifest", hint=AGAIN)
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DeviceError(
            f"{MANIFEST} has schema version {manifest['schema_version']}; this edgectl reads {SCHEMA_VERSION}",
            hint="use the edgectl that came with the bundle",
        )
    wrong = _wrong_list(manifest.get("files")) or _wrong_facts(manifest) or _wrong_name(manifest)
    if wrong:
        raise DeviceError(f"{MANIFEST} {wrong}", hint=f"it was not made by this toolchain, or was changed: {AGAIN}")
    return manifest


def folder_name(manifest: dict[str, Any]) -> str:
    """What a bundle's folder is called."""
    return f"{manifest['name']}-{manifest['version']}-{manifest['target']['name']}"


def is_plain(path: object) -> bool:
    """Whether `path` leads nowhere but into the folder it is relative to, on any file system."""
    return isinstance(path, str) and len(path) <= 240 and all(map(_is_part, path.split("/")))


def _is_part(part: str) -> bool:
    return part[:1] in _FIRST and _REST.issuperset(part)


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
        digest = facts["sha256"]
        if not isinstance(digest, str) or len(digest) != 64 or not _HEX.issuperset(digest):
            return f"gives {path} no SHA-256"
        if type(facts["bytes"]) is not int or not 0 <= facts["bytes"] <= _MOST_BYTES:
            return f"gives {path} no size"
        if facts["mode"] not in MODES:
            return f"gives {path} the mode {facts['mode']!r}, not one of {', '.join(MODES)}"
    for path in listed:
        parents = path.lower().split("/")[:-1]
        inside = next((depth for depth in range(1, len(parents) + 1) if "/".join(parents[:depth]) in seen), None)
        if inside is not None:
            return f"lists {path!r} inside of another file"
    return None


def _wrong_facts(manifest: dict[str, Any]) -> str | None:
    """What is missing, or of another kind than it must be."""
    for part, wanted in _FACTS.items():
        facts = manifest.get(part) if part else manifest
        if not isinstance(facts, dict):
            return f"has no {part}"
        for key, kind in wanted.items():
            if not _is_of(kind, facts.get(key)):
                return f"has no {f'{part}.{key}' if part else key} that is {kind}"
    return None


def _is_of(kind: str, value: object) -> bool:
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _NUMBER:
        return type(value) is int and 0 <= value <= _MOST_BYTES
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _wrong_name(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the names by which the manifest calls itself, the model and the programs."""
    name, model, folder = folder_name(manifest), manifest["model"]["file"], manifest["runtime"]["folder"]
    if not is_plain(name) or "/" in name:
        return f"calls its bundle {name!r}"
    if model not in manifest["files"]:
        return f"names the model {model!r}, which is not among its files"
    return None if is_plain(folder) else f"has its programs in {folder!r}"


def read_small(path: str | os.PathLike[str], limit_bytes: int) -> bytes | None:
    """A file that must be small, None when it is not there. Raises DeviceError for a link, a long one, or no access."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise DeviceError(f"{path} is a link or special file; a bundle has plain files only", hint=AGAIN)
        with open(path, "rb") as file:
            content = file.read(limit_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit_bytes:
        raise DeviceError(f"{path} is longer than {limit_bytes >> 20} MiB: not a bundle's", hint=AGAIN)
    return content


def read_json(path: str) -> Any:
    """What a JSON file of the bundle holds. Raises DeviceError."""
    return parse_json(_read(path), path)


def parse_json(content: bytes, name: str) -> Any:
    """Raises DeviceError for what is not JSON."""
    try:
        return _scan(content.decode())
    except Exception:  # noqa: BLE001 - whatever it is, json's own parser reads it or names it
        import json

    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"{name} is damaged: {error}", hint=AGAIN) from None


class _Plainly:
    """As json.loads parses."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float, parse_int = float, int
    parse_constant = None
    """NaN is not JSON: calling this raises TypeError."""


def _scan(text: str) -> Any:
    """By the parser in C that `json` calls as well; the module around it takes a third of the time before the spawn."""
    from _json import make_scanner

    scan = make_scanner(_Plainly)  # type: ignore[arg-type]
    value, end = scan(text, len(text) - len(text.lstrip(_BLANK)))
    if text[end:].strip(_BLANK):
        raise ValueError
    return value


def _read(path: str) -> bytes:
    content = read_small(path, JSON_LIMIT_BYTES)
    if content is None:
        folder, name = os.path.split(path)
        raise DeviceError(f"no {name} in {folder}", hint=f"this is not a whole bundle: {AGAIN}")
    return content
