"""The systemd unit that edgectl install writes, as text; what it does is seen in tests/containers/test_systemd.py."""

from pathlib import Path
from typing import Any

import pytest

from toolchain.device import service
from toolchain.device.releases import Home, Settings
from toolchain.device.service import Served, unit_text

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
