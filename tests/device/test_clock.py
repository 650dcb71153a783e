"""The wall clock jumps by a year, as on a board without a battery that finds its time server: the service goes on."""

import json
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device import bundles, test_install
from tests.device.test_bundle_served import _ENVIRONMENT
from tests.device.test_install import Device
from toolchain.device import serve
from toolchain.device.client import Client

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
made = test_install.made
_YEAR_S = 365 * 86400


class Clock:
    """The wall clock of everything that is started with its environment."""

    def __init__(self, folder: Path) -> None:
        library = folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        self._offset = folder / "offset"
        self._offset.write_bytes(struct.pack("l", 0))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._offset)}

    def jump(self, seconds: int) -> None:
        with self._offset.open("r+b") as file:
            file.write(struct.pack("l", seconds))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def device(made: dict[str, Path], clock: Clock, tmp_path: Path) -> Iterator[Device]:
    """A device all of whose programs have that clock. edgectl keeps LD_PRELOAD from llama-server: it is wrapped."""
    wrapped = tmp_path / "wrapped"
    shutil.copytree(made["1"], wrapped)
    server = wrapped / "runtime" / "bin" / "llama-server"
    server.rename(server.with_name("llama-server.real"))
    settings = " ".join(f"{name}='{value}'" for name, value in clock.environment.items())
    server.write_text(f'#!/bin/sh\n{settings} exec "$0.real" "$@"\n')
    server.chmod(0o755)
    manifest = json.loads((wrapped / "manifest.json").read_text())
    manifest["files"]["runtime/bin/llama-server.real"] = dict(manifest["files"]["runtime/bin/llama-server"])
    bundles.reseal(wrapped, manifest)
    device = Device(tmp_path / "home", {**made, "1": wrapped}, serve.free_port(), {**_ENVIRONMENT, **clock.environment})
    yield device
    device.edgectl("uninstall")


def _programs(device: Device) -> list[int]:
    """The supervisor, the release's edgectl, llama-server."""
    (edgectl,) = test_install._children(device.supervisor)
    return [device.supervisor, edgectl, device.server()]


def _says(device: Device) -> float:
    """The server's wall clock."""
    question = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
    return float(Client("127.0.0.1", device.port).post("/v1/chat/completions", question)["created"])


@pytest.mark.parametrize("years", [1, -1], ids=["a year on", "a year back"])
def test_a_server_that_is_killed_comes_back_whatever_the_clock_says(device: Device, clock: Clock, years: int) -> None:
    device.install("1")
    for pid in _programs(device):
        assert "clock.so" in Path(f"/proc/{pid}/maps").read_text()
    server = device.server()
    clock.jump(years * _YEAR_S)
    assert _says(device) == pytest.approx(time.time() + years * _YEAR_S, abs=60)
    os.kill(server, signal.SIGKILL)
    device.wait_for("1")
    # And in the pause before the next start.
    again = device.server()
    os.kill(again, signal.SIGKILL)
    clock.jump(-years * _YEAR_S)
    device.wait_for("1")
    assert len({server, again, device.server()}) == 3
    assert _says(device) == pytest.approx(time.time() - years * _YEAR_S, abs=60)
    # And the release's edgectl, which the supervisor starts again.
    os.kill(_programs(device)[1], signal.SIGKILL)
    clock.jump(years * _YEAR_S)
    device.wait_for("1")


def test_an_installation_goes_on_when_the_clock_jumps_in_its_trial(device: Device, clock: Clock) -> None:
    device.install("1")
    with device.start("install", by="2") as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("starting"):
                clock.jump(_YEAR_S)
            if line.startswith("answering"):
                clock.jump(-_YEAR_S)
    assert child.returncode == 0
    assert device.serves() == "2"
