"""Releases on a device: installed, tried, rolled back, killed at every step, filled up, damaged. The server is real."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles
from tests.device.test_bundle_served import _ENVIRONMENT, _PYTHON
from toolchain.device import files, probe, releases, serve, supervise, tuned
from toolchain.device.client import Client
from toolchain.device.errors import DeviceError

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
_KILLER = Path(__file__).with_name("killer.py")
_RESTART_S = 20.0
"""Far above what a restart takes, for a busy machine; what it takes is in docs/device.md."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two good bundles, and one whose answers do not end."""
    llama = bundles.x86_llama()
    return bundles.releases(llama, tmp_path_factory.mktemp("bundles"))


@dataclass
class Device:
    """A home, and the edgectl of a bundle beside it."""

    root: Path
    bundles: dict[str, Path]
    port: int
    environment: dict[str, str] = field(default_factory=lambda: _ENVIRONMENT)

    def argv(self, verb: str, *arguments: str, by: str = "1") -> list[str]:
        return [_PYTHON, "-I", "-S", str(self.bundles[by] / "edgectl"), verb, *self.options(verb), *arguments]

    def edgectl(self, verb: str, *arguments: str, by: str = "1") -> "subprocess.CompletedProcess[str]":
        argv, env = self.argv(verb, *arguments, by=by), self.environment
        return subprocess.run(argv, cwd="/", env=env, capture_output=True, text=True, check=False, timeout=180)

    def start(self, verb: str, *, by: str) -> "subprocess.Popen[str]":
        argv = self.argv(verb, by=by)
        return subprocess.Popen(argv, cwd="/", env=self.environment, stderr=subprocess.PIPE, text=True)

    def options(self, verb: str) -> list[str]:
        options = ["--home", str(self.root), "--service", "process"]
        return [*options, "--port", str(self.port)] if verb == "install" else options

    def install(self, which: str) -> None:
        result = self.edgectl("install", by=which)
        assert result.returncode == 0, result.stderr

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.edgectl("status", "--json").stdout)
        return found

    def serves(self) -> str | None:
        """Version of the bundle that answers now."""
        try:
            status, props = Client("127.0.0.1", self.port, timeout_s=10).request("GET", "/props")
        except OSError:
            return None
        found = re.search(r"/releases/tiny-([^-/]+)-x86-cpu-", str(props.get("model_path"))) if status == 200 else None
        return found[1] if found else None

    def wait_for(self, *versions: str) -> str:
        end_s = time.monotonic() + _RESTART_S
        while (now := self.serves()) not in versions:
            assert time.monotonic() < end_s, f"{now} is served; log: {self.log()[-3000:]}"
            time.sleep(0.02)
        return str(now)

    def log(self) -> str:
        path = self.root / "service.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def supervisor(self) -> int:
        return int(supervise.read_note(self.root / "status.json")["pid"])

    def server(self) -> int:
        """Process of llama-server: the supervisor's edgectl's child."""
        (edgectl,) = _children(self.supervisor)
        (server,) = _children(edgectl)
        return server

    def release(self, version: str) -> Path:
        (found,) = (self.root / "releases").glob(f"tiny-{version}-*")
        return found


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def device(made: dict[str, Path], tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path / "home", made, serve.free_port())
    yield device
    device.edgectl("uninstall")


def test_the_second_release_takes_over_and_the_first_comes_back_by_rollback(device: Device) -> None:
    device.install("1")
    assert device.serves() == "1"
    device.install("2")
    assert device.serves() == "2"
    status = device.status()
    assert status["good"] == device.release("2").name == status["current"] == status["served"]
    assert status["previous"] == device.release("1").name
    assert (status["answers"], status["on_trial"], status["service_runs"]) == (True, False, True)
    assert status["supervisor"] == {"release": status["good"], "state": "ready", "ended": None}
    assert device.edgectl("rollback").returncode == 0
    assert device.serves() == "1"
    assert device.edgectl("rollback").returncode == 0
    assert device.serves() == "2"


def test_a_release_that_is_not_good_is_rolled_back_unattended(device: Device) -> None:
    installed = json.loads(device.edgectl("install", "--json", by="1").stdout)
    assert (installed["good"], installed["reason"], installed["smoke"]["ok"]) == (True, None, True)
    assert installed["serves"] == installed["release"] == device.release("1").name
    result = device.edgectl("install", "--json", by="endless")
    assert result.returncode == 3
    record = json.loads(result.stdout)
    assert record.keys() == installed.keys()
    assert (record["good"], record["serves"], record["release"]) == (
        False,
        device.release("1").name,
        device.release("3").name,
    )
    assert [item["name"] for item in record["smoke"]["checks"] if not item["ok"]] == ["stops at eos"]
    assert record["reason"] in result.stderr
    assert "0 of 2 golden prompts stop at eos" in result.stderr
    assert result.stderr.splitlines()[-1] == f"hint: {device.release('1').name} serves again"
    assert device.serves() == "1"
    status = device.status()
    assert status["good"] == status["current"] == device.release("1").name
    assert status["last_failure"]["release"] == device.release("3").name
    assert (
        device.edgectl("gc").stdout.strip()
        == device.release("1").name.replace("tiny-1", "tiny-3")[:-12] + (status["last_failure"]["release"][-12:])
    )


def test_a_first_release_that_is_not_good_leaves_nothing_that_runs(device: Device) -> None:
    result = device.edgectl("install", by="endless")
    assert result.returncode == 3
    assert device.serves() is None
    status = device.status()
    assert (status["good"], status["current"], status["service_runs"]) == (None, None, False)


def broken(device: Device, tmp_path: Path) -> dict[str, Path]:
    """The device's bundles, and one whose programs do not start."""
    staged = tmp_path / "broken"
    shutil.copytree(device.bundles["2"], staged)
    manifest = json.loads((staged / "manifest.json").read_text())
    server = staged / "runtime" / "bin" / "llama-server"
    server.unlink()
    server.write_bytes(b"#!/bin/false\n")
    server.chmod(0o755)
    bundles.reseal(staged, manifest)
    return {**device.bundles, "broken": staged}


def test_a_release_whose_programs_do_not_start_is_rolled_back(device: Device, tmp_path: Path) -> None:
    device.install("1")
    device.bundles = broken(device, tmp_path)
    result = device.edgectl("install", by="broken")
    assert result.returncode == 3, result.stderr
    assert result.stdout == ""
    assert "llama-server ended with exit code 1" in result.stderr
    assert device.serves() == "1"


def _steps(device: Device, by: str = "2") -> list[str]:
    """What an installation over 1 does, step by step."""
    output = _killed(device, "", by).stdout
    device.wait_for(by)
    return [line for line in output.splitlines() if " #" in line]


def _killed(device: Device, step: str, by: str = "2", verb: str = "install") -> "subprocess.CompletedProcess[str]":
    argv = [_PYTHON, "-I", "-S", str(_KILLER), str(device.bundles[by] / "edgectl"), step]
    argv += [verb, *device.options(verb)]
    return subprocess.run(argv, cwd="/", env=_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=180)


def _points(steps: list[str]) -> list[str]:
    """Each step that makes a difference, once; of the copying, all of which test_killed has, one; three questions."""
    copying = [step for step in steps if ".unpacking/" in step and step.startswith("open")]
    telling = [
        step
        for step in steps
        if re.match(r"open [^\d ]|os.rename|os.symlink|fcntl.flock|os.truncate", step) and step not in copying
    ]
    return [copying[len(copying) // 2], *telling, "ask #1", "ask #2", "ask #10"]


def test_install_killed_at_every_step_leaves_a_good_release_in_service(device: Device) -> None:
    device.install("1")
    points = _points(_steps(device))
    assert len(points) >= 20
    for point in points:
        # As if 2 had never been there.
        device.install("1")
        home = releases.Home(device.root)
        home.write_state(releases.State(good=device.release("1").name))
        device.edgectl("gc")
        assert len(home.names()) == 1, point
        result = _killed(device, point)
        assert result.returncode == -signal.SIGKILL, (point, result.stderr)
        good = home.state().good
        assert good is not None
        version = good.split("-")[1]
        assert device.wait_for(version) == version, point
        for name in home.names():
            assert not device_problems(home.folder(name)), (point, name)
        device.install("2")
        assert device.serves() == "2", point
        assert [path.name for path in (device.root / "releases").iterdir() if path.name.startswith(".")] == [], point


def test_a_reinstallation_with_another_port_killed_at_every_step_leaves_the_port_as_it_was(device: Device) -> None:
    device.install("1")
    home, known = releases.Home(device.root), device.port
    name = device.release("1").name
    other = device.port = serve.free_port()
    steps = _steps(device, "1")
    kept = next(step for step in steps if step.startswith("os.rename") and ".trial.json #" in step)
    settings = [step for step in steps if "/settings/" in step and step.startswith(("open", "os.rename"))]
    for point in [*settings, "ask #1", "ask #10", f"open {home.root}/.state.json.new #1"]:
        if home.settings(name).port != known:
            device.port = known
            device.install("1")
        device.port = other
        assert _killed(device, point, "1").returncode == -signal.SIGKILL, point
        is_kept = steps.index(point) > steps.index(kept) if point in steps else False
        device.port = home.settings(name).port
        assert device.port == (other if is_kept else known), point
        device.wait_for("1")
    device.port = known
    device.install("1")
    assert [path.name for path in (home.root / "settings").iterdir()] == [f"{name}.json"]


def device_problems(folder: Path) -> list[str]:
    return files.problems(files.open_bundle(folder))


def test_kill_9_of_the_server_in_mid_answer_is_followed_by_a_restart(device: Device) -> None:
    device.install("1")
    broken: list[str] = []

    def ask() -> None:
        question = [{"role": "user", "content": "?"}]
        while not broken:  # the tiny model may be done with one answer before the server is found
            try:
                Client("127.0.0.1", device.port).chat(question, max_tokens=3000, ignore_eos=True)
            except (OSError, DeviceError) as error:
                broken.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    server = device.server()
    os.kill(server, signal.SIGKILL)
    thread.join()
    assert len(broken) == 1
    device.wait_for("1")
    assert device.server() != server
    assert "was ended by SIGKILL (often: out of memory)" in device.log()


def test_kill_9_of_the_releases_edgectl_takes_the_server_along_and_is_followed_by_a_restart(device: Device) -> None:
    device.install("1")
    (edgectl,) = _children(device.supervisor)
    os.kill(edgectl, signal.SIGKILL)
    end_s = time.monotonic() + _RESTART_S
    while _children(device.supervisor) in ([], [edgectl]):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    device.wait_for("1")


def test_a_good_release_that_is_killed_after_it_started_is_not_stood_in_for(device: Device) -> None:
    device.install("1")
    device.install("2")
    for times in range(1, 4):
        (edgectl,) = _children(device.supervisor)
        os.kill(edgectl, signal.SIGKILL)
        end_s = time.monotonic() + _RESTART_S
        # Of both installations and of each start after a kill.
        while device.log().count("ready after") < 2 + times:
            assert time.monotonic() < end_s, device.log()[-3000:]
            time.sleep(0.02)
        assert device.serves() == "2"
    assert "is served instead" not in device.log()


def _damaged(device: Device) -> tuple[Path, bytes]:
    """The model of a good release 2 was cut, and 1 stands in for it: the model's file, and what was in it."""
    device.install("1")
    device.install("2")
    model = next((device.release("2") / "model").iterdir())
    content = model.read_bytes()
    model.unlink()
    model.write_bytes(content[: len(content) // 2])
    os.kill(device.server(), signal.SIGKILL)
    device.wait_for("1")
    return model, content


def test_a_good_release_that_was_damaged_is_stood_in_for_by_the_one_before(device: Device) -> None:
    _damaged(device)
    assert "which was good before it, is served instead" in device.log()
    # Address and key stay as they were.
    again = bundles.edgectl(device.bundles["2"], "install", "--home", str(device.root), "--service", "process")
    assert again.returncode == 0, again.stderr
    assert device.serves() == "2"


def test_status_tells_who_stands_in_and_what_puts_it_right(device: Device) -> None:
    model, content = _damaged(device)
    found = device.status()
    assert (found["served"], found["answers"]) == (device.release("2").name, False)
    stand_in = found["stand_in"]
    assert (stand_in["release"], stand_in["answers"]) == (device.release("1").name, True)
    assert "changed" in stand_in["wrong"]
    assert stand_in["remedy"].startswith("install it again from a whole copy; or edgectl rollback")
    model.write_bytes(content)
    stand_in = device.status()["stand_in"]
    assert stand_in["wrong"] is None
    assert stand_in["remedy"].startswith(f"it is whole: {device.release('2')}/edgectl install")
    assert device.edgectl("install", by="2").returncode == 0
    assert device.serves() == "2"
    assert device.status()["stand_in"] is None


def test_a_rollback_keeps_what_stands_in(device: Device) -> None:
    _damaged(device)
    assert device.edgectl("rollback").returncode == 0
    found = device.status()
    assert (found["good"], found["answers"], found["stand_in"]) == (device.release("1").name, True, None)


def test_a_changed_byte_of_the_model_is_noticed_at_the_next_start(device: Device) -> None:
    device.install("1")
    model = next((device.release("1") / "model").iterdir())
    content = bytearray(model.read_bytes())
    content[-100] ^= 1
    model.write_bytes(content)
    os.kill(device.server(), signal.SIGKILL)
    end_s = time.monotonic() + _RESTART_S
    while "its bytes are not those that were built" not in device.log():
        assert time.monotonic() < end_s, device.log()[-2000:]
        time.sleep(0.05)


@contextmanager
def uninstalled(device: Device) -> Iterator[None]:
    """In the end, whatever happens."""
    try:
        yield
    finally:
        device.edgectl("uninstall")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes at `folder`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_good_release_in_service(made: dict[str, Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in made["1"].rglob("*") if path.is_file())
    device = Device(disk / "home", made, serve.free_port())
    with small_disk(disk, int(size * 1.3)), uninstalled(device):
        device.install("1")
        result = device.edgectl("install", by="2")
        assert result.returncode == 1
        assert "MiB free, the bundle needs" in result.stderr
        assert device.serves() == "1"
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize))
        os.kill(device.server(), signal.SIGKILL)
        device.wait_for("1")
        assert len(releases.Home(device.root).names()) == 1
        assert device.edgectl("gc").returncode == 0
        assert device.edgectl("uninstall").returncode == 0
        assert not device.root.exists()


def test_a_port_that_is_taken_is_said_before_anything_is_changed(device: Device) -> None:
    import socket

    with socket.create_server(("127.0.0.1", device.port)):
        result = device.edgectl("install")
    assert result.returncode == 4
    assert f"port {device.port} on 127.0.0.1 is in use" in result.stderr
    assert "./edgectl install --port " in result.stderr
    assert device.status()["current"] is None


def test_a_home_inside_of_the_bundle_is_refused(device: Device) -> None:
    device.root = device.bundles["1"] / "home"
    result = device.edgectl("install")
    assert result.returncode == 2
    assert "is inside the bundle" in result.stderr
    assert not device.root.exists()


@pytest.mark.parametrize("verb", ["gc", "rollback", "uninstall"])
def test_a_home_that_is_not_there_is_not_made(device: Device, verb: str) -> None:
    result = device.edgectl(verb)
    assert result.returncode == 1
    assert f"{device.root}: nothing is installed there" in result.stderr
    assert not device.root.exists()


def test_a_release_that_is_damaged_is_not_installed_from_itself(device: Device) -> None:
    device.install("1")
    card = device.release("1") / "MODEL_CARD.md"
    card.write_bytes(card.read_bytes().swapcase())
    argv = [_PYTHON, "-I", "-S", str(device.release("1") / "edgectl"), "install", *device.options("install")]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    assert result.returncode == 1
    assert "MODEL_CARD.md: changed" in result.stderr
    assert device.release("1").is_dir()
    assert device.serves() == "1"


def test_another_port_for_the_same_release_is_taken_up(device: Device) -> None:
    device.install("1")
    supervisor, device.port = device.supervisor, serve.free_port()
    device.install("1")
    assert device.serves() == "1"
    assert device.status()["previous"] is None
    assert device.supervisor == supervisor


def test_a_running_service_is_opened_to_the_network_on_its_own_port(device: Device, tmp_path: Path) -> None:
    device.install("1")
    key = tmp_path / "key"
    key.write_text("open sesame\n")
    result = device.edgectl("install", "--host", "0.0.0.0", "--api-key-file", str(key))
    assert result.returncode == 0, result.stderr
    assert Client("127.0.0.1", device.port).request("GET", "/props")[0] == 401
    key.unlink()
    result = device.edgectl("status", "--json")
    found = json.loads(result.stdout)
    assert (result.returncode, found["answers"]) == (1, False)
    assert str(key) in found["why_not"]


def test_the_service_uses_what_tune_has_found_and_the_record_goes_with_the_release(device: Device) -> None:
    bundle, machine = files.open_bundle(device.bundles["1"]), tuned.fingerprint(probe.probe())
    known = {"bundle": bundle.id, "device": machine}
    settings = {**known, "threads": 1, "arguments": ["--ubatch-size", "128"], "gain": 1.5}
    path = tuned.record_path(device.root, bundle.id, machine)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**known, "schema_version": 1, "conclusive": True, "tuned": settings}))
    device.install("1")
    argv = Path(f"/proc/{device.server()}/cmdline").read_bytes().decode().split("\0")
    assert argv[argv.index("--threads") + 1] == "1"
    assert argv[argv.index("--ubatch-size") + 1] == "128"
    assert "settings: tuned, 1.50 × as fast: --threads 1 --ubatch-size 128" in device.log()
    device.install("2")
    assert "settings: the presets'" in device.log()
    home = releases.Home(device.root)
    home.write_state(releases.State(good=device.release("2").name))
    assert path.exists()
    assert device.edgectl("gc").returncode == 0
    assert not path.exists()


def test_a_second_installation_waits_or_is_refused(device: Device) -> None:
    device.install("1")
    home = releases.Home(device.root)
    with home.locked("install"):
        result = device.edgectl("install", by="2")
    assert result.returncode == 4
    assert f"is in use: edgectl install, process {os.getpid()}" in result.stderr
    assert device.serves() == "1"


def test_a_tampered_bundle_is_not_staged(device: Device, tmp_path: Path) -> None:
    device.install("1")
    copy = tmp_path / "tampered"
    shutil.copytree(device.bundles["2"], copy)
    card = copy / "MODEL_CARD.md"
    card.write_bytes(card.read_bytes().swapcase())
    device.bundles = {**device.bundles, "tampered": copy}
    result = device.edgectl("install", by="tampered")
    assert result.returncode == 1
    assert "MODEL_CARD.md: changed" in result.stderr
    assert device.serves() == "1"
    assert len(releases.Home(device.root).names()) == 1
    assert not list((device.root / "releases").glob(".*"))


def test_a_bundle_for_another_machine_is_refused_and_removed(device: Device, tmp_path: Path) -> None:
    device.install("1")
    copy = tmp_path / "arm"
    shutil.copytree(device.bundles["2"], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"]["arch"] = "aarch64"
    bundles.reseal(copy, manifest)
    device.bundles = {**device.bundles, "arm": copy}
    result = device.edgectl("install", by="arm")
    assert result.returncode == 1
    assert "the bundle is for aarch64" in result.stderr
    assert device.serves() == "1"
    assert len(releases.Home(device.root).names()) == 1


def test_a_bundle_that_asks_too_much_of_the_processor_is_refused_before_anything_stops(
    device: Device, tmp_path: Path
) -> None:
    device.install("1")
    server = device.server()
    copy = tmp_path / "other"
    shutil.copytree(device.bundles["2"], copy)
    lacking = bundles.ask_too_much(copy)
    device.bundles = {**device.bundles, "other": copy}
    result = device.edgectl("install", by="other")
    assert result.returncode == 1
    assert "cannot run here: instruction set: this processor lacks " in result.stderr
    assert lacking in result.stderr
    assert (device.serves(), device.server()) == ("1", server)
    assert len(releases.Home(device.root).names()) == 1


def test_an_archive_is_installed_by_the_edgectl_that_is_there(device: Device, tmp_path: Path) -> None:
    device.install("1")
    archive = tmp_path / "2.tar"
    packed = bundles.toolchain("pack", str(device.bundles["2"]), "--form", "archive", "--out", str(archive))
    assert packed.returncode == 0, packed.stderr
    result = device.edgectl("install", str(archive))
    assert result.returncode == 0, result.stderr
    assert device.serves() == "2"


def test_the_key_of_a_file_is_asked_for_and_an_open_address_needs_one(device: Device, tmp_path: Path) -> None:
    result = device.edgectl("install", "--host", "0.0.0.0")
    assert result.returncode == 2
    assert "there is no API key" in result.stderr
    assert result.stderr.splitlines()[-1] == "hint: add --api-key-file F, or leave --host out"
    key = tmp_path / "key"
    key.write_text("open sesame\n")
    result = device.edgectl("install", "--host", "0.0.0.0", "--api-key-file", str(key))
    assert result.returncode == 0, result.stderr
    assert Client("127.0.0.1", device.port).request("GET", "/props")[0] == 401
    assert Client("127.0.0.1", device.port, "open sesame").request("GET", "/props")[0] == 200


def test_a_key_of_the_environment_is_not_the_services(device: Device) -> None:
    device.environment = {**_ENVIRONMENT, "EDGECTL_API_KEY": "open sesame"}
    result = device.edgectl("install")
    assert result.returncode == 0, result.stderr
    assert "EDGECTL_API_KEY is not used by an installation" in result.stderr
    assert device.serves() == "1"


def test_uninstall_ends_the_supervisor_whatever_its_note_says(device: Device) -> None:
    device.install("1")
    note = device.root / "status.json"
    with subprocess.Popen(["sleep", "600"]) as other:
        note.unlink()
        note.write_text(json.dumps({"pid": other.pid}))
        result = device.edgectl("uninstall")
        lives = other.poll() is None
        other.kill()
    assert (result.returncode, lives) == (0, True), result.stderr
    assert device.serves() is None


def test_a_service_whose_process_is_not_to_be_seen_is_not_left_behind(device: Device) -> None:
    device.install("1")
    handle = os.open(device.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.kill(device.supervisor, signal.SIGKILL)
        fcntl.flock(handle, fcntl.LOCK_EX)
        result = device.edgectl("uninstall")
    finally:
        os.close(handle)
    assert result.returncode == 1
    assert "has a service that runs, and its process is not to be seen" in result.stderr
    assert device.release("1").is_dir()


def test_uninstall_leaves_what_is_not_ours(device: Device) -> None:
    device.install("1")
    (device.root / "notes.txt").write_text("mine")
    release = device.release("1").name
    result = device.edgectl("uninstall", "--json")
    assert (result.returncode, json.loads(result.stdout)) == (0, {"schema_version": 1, "removed": [release]})
    assert [path.name for path in device.root.iterdir()] == ["notes.txt"]
    assert device.serves() is None
    again = device.edgectl("uninstall")
    assert again.returncode == 1
    assert "nothing is installed there" in again.stderr


@pytest.mark.parametrize("content", ["{", '{"schema_version":1,"good":5,"previous":null,"failed":null}'])
def test_a_damaged_state_is_named_and_the_device_goes_on(device: Device, content: str) -> None:
    device.install("1")
    (device.root / "state.json").write_text(content)
    os.kill(device.server(), signal.SIGKILL)
    device.wait_for("1")
    for verb in ("status", "install"):
        result = device.edgectl(verb, by="2")
        assert result.returncode == 1
        assert "state.json is damaged" in result.stderr
        assert "Traceback" not in result.stderr
    assert device.serves() == "1"
    (device.root / "state.json").unlink()


def test_a_good_release_whose_settings_are_damaged_is_stood_in_for(device: Device) -> None:
    device.install("1")
    device.install("2")
    path = device.root / "settings" / f"{device.release('2').name}.json"
    whole = path.read_text()
    path.write_text(json.dumps({"port": str(device.port)}))
    result = device.edgectl("install", by="2")
    assert result.returncode == 1
    assert f"error: {path} is damaged" in result.stderr
    assert device.serves() == "2"
    (edgectl,) = _children(device.supervisor)
    os.kill(edgectl, signal.SIGKILL)
    device.wait_for("1")
    path.write_text(whole)
    device.wait_for("2")


def test_another_port_is_given_up_when_the_installation_is_interrupted(device: Device) -> None:
    device.install("1")
    known, device.port = device.port, serve.free_port()
    with device.start("install", by="1") as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("answering"):
                break
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
    assert child.returncode == 130, rest
    assert device.serves() is None
    device.port = known
    assert device.serves() == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_installation_that_is_interrupted_goes_back_at_once(device: Device, number: signal.Signals) -> None:
    device.install("1")
    here = signal.signal(number, signal.SIG_DFL)  # one that is ignored here, as under nohup, would be there too
    try:
        started = device.start("install", by="endless")
    finally:
        signal.signal(number, here)
    with started as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("answering"):
                break
        child.send_signal(number)
        rest = child.stderr.read()
    assert child.returncode == (130 if number == signal.SIGINT else 143), rest
    assert "Traceback" not in rest
    assert device.serves() == "1"
    assert device.status()["good"] == device.release("1").name


def test_restarts_wait_longer_each_time_and_a_steady_life_ends_the_row() -> None:
    restarts = serve.Restarts()
    assert [restarts.after(1) for _ in range(6)] == [0.5, 1, 2, 4, 8, 16]
    assert restarts.after(1) is None
    assert restarts.after(61) == 0.5
    assert restarts.after(1) == 1
