"""The way to the server's spawn: short, and no other than that of the modules which it goes without."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import toolchain.device
from toolchain.device import cli, launch, manifest
from toolchain.device.errors import DeviceError

DEVICE = Path(toolchain.device.__file__).parent
HEAVY = {
    "argparse",
    "ctypes",
    "dataclasses",
    "enum",
    "hashlib",
    "json",
    "pathlib",
    "re",
    "socket",
    "subprocess",
    "typing",
}
_LIMIT_S = 30.0


def test_little_is_loaded_to_get_there(tmp_path: Path) -> None:
    (tmp_path / "device").symlink_to(DEVICE)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import device.main; print(*sys.modules)"
    argv = [sys.executable, "-I", "-S", "-B", "-c", code]
    loaded = set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    assert "device.launch" in loaded
    assert not loaded & HEAVY
    assert not loaded & {"device.cli", "device.serve", "device.files"}


def by_argparse(arguments: list[str]) -> dict[str, object] | None:
    try:
        found = cli._parser("serve").parse_args(["serve", *arguments])
    except SystemExit:
        return None
    key = found.api_key_file
    return {
        "host": found.host,
        "port": found.port,
        "api_key_file": key,
        "home": found.home,
        "no_tuned": found.no_tuned,
        "json": found.json,
    }


def by_hand(arguments: list[str]) -> dict[str, object] | None:
    found = launch.options(arguments)
    if found is None:
        return None
    key = found.api_key_file
    return {
        "host": found.host,
        "port": found.port,
        "api_key_file": None if key is None else Path(key),
        "home": Path(launch.default_home() if found.home is None else found.home),
        "no_tuned": found.no_tuned,
        "json": found.json,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--port", "80"],
        ["--port=80", "--host=::1", "--no-tuned"],
        ["--json", "--port", "80"],
        ["--host", "0.0.0.0", "--api-key-file", "a key", "--home", "/a b", "--port", "1", "--port", "2"],
        ["--host", "", "--home="],
    ],
)
def test_options_are_read_as_argparse_reads_them(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.HOME_VARIABLE, raising=False)
    assert by_hand(arguments) == by_argparse(arguments) is not None


_WORDS = [
    "--host",
    "--port",
    "--po",
    "--api-key-file",
    "--home",
    "--no-tuned",
    "--json",
    "--help",
    "-h",
    "--",
    "80",
    "x",
    "",
    "-1",
]
_WORDS += [
    "--host=x",
    "--port=80",
    "--port=",
    "--port=x",
    "--port=8_0",
    "--no-tuned=",
    "--no-tuned=1",
    "--home=-a",
    "٣",
]


@given(st.lists(st.sampled_from(_WORDS), max_size=5))
@example(["--port", "٣"])
def test_what_is_not_left_to_argparse_is_read_alike(arguments: list[str]) -> None:
    found = by_hand(arguments)
    assert found is None or found == by_argparse(arguments)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_JSON, st.booleans(), st.sampled_from([None, 2]))
def test_json_is_read_as_json_reads_it(value: object, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert manifest._scan(f" {text}\n") == value
    assert manifest.parse_json(text.encode(), "x") == value


@pytest.mark.parametrize("content", [b"", b"{", b"[1] 2", b"\xff", b"[1,]", b"{'a': 1}", b"[" * 100_000])
def test_what_is_not_json_is_named(content: bytes) -> None:
    with pytest.raises(DeviceError, match=r"x\.json is damaged: ."):
        manifest.parse_json(content, "x.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_json_in_other_encodings_is_read_too(encoding: str) -> None:
    assert manifest.parse_json('{"a": "ß"}'.encode(encoding), "x") == {"a": "ß"}
    assert math.isnan(manifest.parse_json("NaN".encode(encoding), "x"))


def test_braces_that_are_no_placeholder_stay() -> None:
    values = {"a": "{b}", "b_c": "2"}
    parts = ["{a}{b_c}", "{", "}", "{}", "{a", "a}", "{A}", '{"a": 1}', "{{a}}"]
    assert launch.fill(parts, values) == ["{b}2", "{", "}", "{}", "{a", "a}", "{A}", '{"a": 1}', "{{b}}"]


def start(script: str, folder: Path, key: str | None = None) -> launch.Child:
    return launch.spawn(["/bin/sh", "-c", script], cwd=str(folder), key=key)


def said(child: launch.Child) -> str:
    with os.fdopen(child.output) as output:
        return output.read()


def test_a_server_has_what_it_is_given_and_nothing_else(tmp_path: Path) -> None:
    lasting = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(lasting, True)
    try:
        script = "pwd; echo $LLAMA_API_KEY; read line; echo $?; grep SigIgn /proc/$$/status; ps -o sid= $$; echo $$; "
        child = start(script + "echo to stderr >&2; ls /proc/$$/fd", tmp_path, key="secret")
        lines = said(child).split("\n")
        assert child.wait() == 0
    finally:
        os.close(lasting)
    assert lines[:3] == [str(tmp_path), "secret", "1"]
    assert int(lines[3].split()[1], 16) & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)) == 0
    assert lines[4].strip() == lines[5] == str(child.pid)
    assert lines[6:] == ["to stderr", "0", "1", "2", ""]


@pytest.mark.parametrize(("program", "why"), [("gone", "No such file"), ("plain", "Permission denied")])
def test_a_program_that_cannot_be_started_is_named(tmp_path: Path, program: str, why: str) -> None:
    (tmp_path / "plain").write_text("")
    with pytest.raises(DeviceError, match=f"cannot start {tmp_path / program}: {why}"):
        launch.spawn([str(tmp_path / program)], cwd=str(tmp_path))


def test_how_a_server_ended_is_known(tmp_path: Path) -> None:
    assert start("exit 7", tmp_path).wait() == 7
    slow = start("exec sleep 600", tmp_path)
    assert (slow.poll(), slow.wait(0.05)) == (None, None)
    slow.terminate()
    assert slow.wait(_LIMIT_S) == slow.poll() == slow.returncode == -signal.SIGTERM
    slow.kill()  # nobody is hit


def test_a_server_can_be_killed_while_another_thread_waits_for_it(tmp_path: Path) -> None:
    child = start("exec sleep 600", tmp_path)
    threading.Timer(0.1, child.kill).start()
    assert child.wait() == -signal.SIGKILL
