"""What the device refuses to read as a bundle's manifest."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.device import files
from toolchain.device.errors import DeviceError

_FILE = {"sha256": "0" * 64, "bytes": 1, "mode": "0644"}


def manifest(**changed: Any) -> dict[str, Any]:
    return {
        "schema_version": files.SCHEMA_VERSION,
        "bundle_id": "sha256:" + "0" * 64,
        "name": "tiny",
        "version": "1.0",
        "target": {"name": "x86-cpu", "arch": "x86_64"},
        "model": {"file": "model/tiny.gguf", "bytes": 1, "cache_bytes": 1, "context": 64, "parallel": 1},
        "runtime": {
            "folder": "runtime/bin",
            "backend": "CPU",
            "glibc_needed": "2.30",
            "segment_alignment": 4096,
            "device_libraries": [],
            "flags": [],
        },
        "files": {"model/tiny.gguf": _FILE, "edgectl": {**_FILE, "mode": "0755"}},
        **changed,
    }


def listing(*paths: str, **facts: Any) -> dict[str, Any]:
    return manifest(files={**manifest()["files"], **{path: {**_FILE, **facts} for path in paths}})


def parse(content: dict[str, Any]) -> dict[str, Any]:
    return files.parse_manifest(json.dumps(content).encode())


def test_a_plain_manifest_is_read() -> None:
    assert parse(manifest()) == manifest()
    assert files.folder_name(manifest()) == "tiny-1.0-x86-cpu"


OUTSIDE = [
    "../evil",
    "model/../../evil",
    "/etc/passwd",
    "model//evil",
    "./evil",
    "model/",
    "",
    ".hidden",
    "a\\b",
    "C:evil",
    "new\nline",
    "nul\0",
    "caf\u00e9",
    "a" * 241,
]


@pytest.mark.parametrize("path", OUTSIDE, ids=repr)
def test_a_path_that_is_not_plainly_inside_is_refused(path: str) -> None:
    with pytest.raises(DeviceError, match="not a plain path inside the bundle"):
        parse(listing(path))


@pytest.mark.parametrize("path", ["manifest.json", "SHA256SUMS", "sha256sums.SIG", "EdgeCtl"])
def test_a_file_may_not_be_listed_as_another_one(path: str) -> None:
    with pytest.raises(DeviceError, match="twice, or as a file of another purpose"):
        parse(listing(path))


def test_a_file_may_not_lie_inside_of_another_file() -> None:
    with pytest.raises(DeviceError, match="'edgectl/x/y' inside of another file"):
        parse(listing("edgectl/x/y"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"schema_version": 99}, "has schema version 99; this edgectl reads 1"),
        ({"files": {}}, "lists no files"),
        ({"files": ["edgectl"]}, "lists no files"),
        ({"name": "../up"}, "calls its bundle '../up-1.0-x86-cpu'"),
        ({"target": None}, "has no target"),
        ({"bundle_id": None}, "has no bundle_id that is a text"),
        ({"model": manifest()["model"] | {"file": "model/other.gguf"}}, "not among its files"),
        ({"model": manifest()["model"] | {"file": {}}}, r"has no model\.file that is a text"),
        ({"model": manifest()["model"] | {"cache_bytes": 1e9}}, r"has no model\.cache_bytes that is a whole number"),
        ({"runtime": manifest()["runtime"] | {"folder": "/usr/bin"}}, "has its programs in '/usr/bin'"),
        ({"runtime": manifest()["runtime"] | {"segment_alignment": "4k"}}, r"no runtime\.segment_alignment that is"),
        ({"runtime": manifest()["runtime"] | {"device_libraries": [1]}}, "that is a list of texts"),
    ],
)
def test_what_else_is_wrong_with_a_manifest_is_named(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(DeviceError, match=says) as caught:
        parse(manifest(**changed))
    assert caught.value.hint


@pytest.mark.parametrize(
    "facts",
    [
        {"mode": "4755"},
        {"mode": 0o755},
        {"bytes": -1},
        {"bytes": 2**100},
        {"bytes": True},
        {"sha256": "0" * 63},
        {"more": 1},
    ],
)
def test_facts_of_a_file_are_of_one_form(facts: dict[str, Any]) -> None:
    with pytest.raises(DeviceError):
        parse(listing("model/b", **facts))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"files": 1}'])
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(DeviceError, match=r"damaged|not a bundle's manifest"):
        files.parse_manifest(content)


@given(st.binary(max_size=300))
def test_no_bytes_end_in_a_traceback(content: bytes) -> None:
    with pytest.raises(DeviceError):
        files.parse_manifest(content)


@given(st.text(max_size=40))
def test_a_plain_path_stays_inside_whatever_it_is_joined_to(path: str) -> None:
    import posixpath

    if files.is_plain(path):
        assert posixpath.normpath(posixpath.join("/bundle", path)) == f"/bundle/{path}"
