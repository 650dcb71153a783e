"""The systemd unit that edgectl install writes, as text; what it does is seen in tests/containers/test_systemd.py."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from toolchain.device import service, supervise
from toolchain.device.errors import DeviceError
from toolchain.device.releases import Home, Settings
from toolchain.device.service import Served, Service, unit_text

HOME = Home(Path("/var/lib/edgectl"))


def _manifest(backend: str = "CPU", model_bytes: int = 1 << 30) -> dict[str, Any]:
    return {"name": "tiny", "runtime": {"backend": backend}, "model": {"bytes": model_bytes, "cache_bytes": 0}}


def _lines(*served: Served) -> list[str]:
    return unit_text(HOME, "edgectl", served).splitlines()


def test_the_unit_allows_for_every_release_that_may_be_served(tmp_path: Path) -> None:
    keys = [tmp_path / "a", tmp_path / "50%"]
    for key in keys:
        key.touch()
    small = Served("tiny-2", Settings(api_key_file=str(keys[0])), _manifest(model_bytes=1 << 20))
    large = Served("tiny-1", Settings("0.0.0.0", 80, str(keys[1])), _manifest())
    lines = _lines(small, large)
    assert f"MemoryMax={service.memory_limit_bytes(large.manifest)}" in lines
    assert f"LoadCredential=tiny-2:{keys[0]}" in lines
    assert f"LoadCredential=tiny-1:{tmp_path}/50%%" in lines
    assert "IPAddressDeny=any" not in lines
    assert "IPAddressDeny=any" in _lines(small)


def test_a_key_that_is_gone_does_not_keep_the_service_from_starting(tmp_path: Path) -> None:
    gone = Served("tiny-1", Settings(api_key_file=str(tmp_path / "gone")), _manifest())
    assert not [line for line in _lines(gone) if line.startswith("LoadCredential")]


def test_the_unit_has_the_keys_of_a_trial_and_those_that_it_goes_back_to(tmp_path: Path) -> None:
    tried, kept = tmp_path / "tried", tmp_path / "kept"
    for key in (tried, kept):
        key.touch()
    trial = Served("tiny-1", Settings(api_key_file=str(tried)), _manifest())
    before = Served("tiny-1", Settings(api_key_file=str(kept)), _manifest())
    lines = _lines(trial, before)
    assert f"LoadCredential=tiny-1:{tried}" in lines
    assert f"LoadCredential={supervise.credential('tiny-1', str(kept))}:{kept}" in lines
    assert len([line for line in _lines(trial, trial) if line.startswith("LoadCredential")]) == 1


def test_whoever_looks_whether_a_service_runs_is_none(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        assert not Service(Home(tmp_path), "process").runs()
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert Service(Home(tmp_path), "process").runs()
    finally:
        os.close(handle)


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EACCES, "run as root"), (errno.EISDIR, "remove what is there"), (errno.ENOSPC, "free some space")],
)
def test_a_lock_that_cannot_be_had_is_named(
    number: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(DeviceError, match=f"{tmp_path}/lock: {os.strerror(number)}") as error,
        Home(tmp_path).locked("gc"),
    ):
        pass
    assert (error.value.hint or "").startswith(hint)


def test_a_full_disk_has_no_room_for_the_holders_name_and_is_locked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with Home(tmp_path).locked("gc"):
        assert Home(tmp_path).is_locked()


@pytest.mark.parametrize(
    "content", ['{"port": "18931"}', '{"port": true}', '{"host": 1}', '{"api_key_file": 5}', "{", "[]"]
)
def test_damaged_settings_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "tiny-1.json").write_text(content)
    with pytest.raises(DeviceError, match=r"tiny-1\.json is damaged"):
        Home(tmp_path).settings("tiny-1")


@pytest.mark.parametrize(
    ("host", "waits"), [("127.0.0.1", False), ("0.0.0.0", False), ("::", False), ("192.168.1.2", True)]
)
def test_an_address_of_one_network_waits_for_that_network(host: str, waits: bool) -> None:
    lines = _lines(Served("tiny-1", Settings(host), _manifest()))
    assert ("After=network-online.target" in lines, "Wants=network-online.target" in lines) == (waits, waits)


def test_a_gpu_is_not_hidden() -> None:
    hiding = ("PrivateDevices", "ProtectClock", "DeviceAllow", "MemoryDenyWriteExecute")
    for backend, hidden in (("CPU", 3), ("CUDA", 0)):
        lines = _lines(Served("tiny-1", Settings(), _manifest(backend)))
        assert len([line for line in lines if line.startswith(hiding)]) == hidden


def test_python_is_called_by_a_name_that_outlives_an_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(Path("/usr/bin/python3").resolve()))
    assert service.supervisor_argv(HOME)[0] == "/usr/bin/python3"
    monkeypatch.setattr("sys.executable", "/opt/python/bin/python3.12")
    assert service.supervisor_argv(HOME)[0] == "/opt/python/bin/python3.12"
