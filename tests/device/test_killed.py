"""kill −9 of edgectl at each of its steps while it copies, goes back, rolls back, clears up and takes itself away."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device import test_install
from tests.device.test_install import _RESTART_S, Device, _killed, broken, device_problems, small_disk, uninstalled
from toolchain.device import releases, serve

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
made = test_install.made
device = test_install.device
_CHANGES = re.compile(
    r"(open|os\.(mkdir|rename|symlink|chmod|remove|rmdir)|shutil\.rmtree) /|os\.(symlink|kill)|subproc"
)
"""Steps of which what was changed is known by name: before each is after all that came before it."""


def _steps(device: Device, verb: str, by: str) -> list[str]:
    return [line for line in _killed(device, "", by, verb).stdout.splitlines() if " #" in line]


def _kill(device: Device, point: str, verb: str, by: str) -> None:
    result = _killed(device, point, by, verb)
    assert result.returncode == -signal.SIGKILL, (point, result.stderr)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _silent(device: Device) -> None:
    """Nothing is served, at the latest after the restart time."""
    end_s = time.monotonic() + _RESTART_S
    while device.serves() is not None:
        assert time.monotonic() < end_s, device.log()[-2000:]
        time.sleep(0.05)


def test_an_installation_killed_while_it_copies_leaves_the_good_release_alone(device: Device) -> None:
    device.install("1")
    home = releases.Home(device.root)
    steps = _steps(device, "install", "endless")
    begin = next(index for index, step in enumerate(steps) if step.startswith("os.mkdir") and ".unpacking" in step)
    end = next(index for index, step in enumerate(steps) if step.startswith("os.rename") and ".unpacking" in step)
    files = [step for step in steps[begin:end] if _CHANGES.match(step) and not step.startswith("os.mkdir")]
    between = [step for step in steps[begin:end] if step not in files]
    assert len(files) >= 60
    device.wait_for("1")
    server = device.server()
    assert device.edgectl("gc").returncode == 0
    # Every fourth of the files, with and without its content and its mode; each before another one is made whole.
    for point in [*files[::4], *between[:: len(between) // 6], steps[end]]:
        _kill(device, point, "install", "endless")
        assert home.names() == [device.release("1").name], point
        assert (device.serves(), device.server()) == ("1", server), point
    device.install("2")
    assert device.serves() == "2"
    assert [name for name in _names(home.releases) if name.startswith(".")] == []


def test_a_rollback_killed_before_each_change_leaves_a_good_release_in_service(device: Device) -> None:
    device.install("1")
    device.install("2")
    home = releases.Home(device.root)
    both = {device.release(version).name for version in ("1", "2")}
    steps = _steps(device, "rollback", "1")
    settings = next(step for step in steps if step.startswith("open") and "/settings/" in step)
    points = [settings, *[step for step in steps if re.match(r"os.rename /|os.symlink .* #2|ask #1$", step)]]
    assert len(points) >= 7
    for point in points:
        if home.state().good == device.release("1").name:
            assert device.edgectl("rollback").returncode == 0, point
        assert device.edgectl("gc").returncode == 0, point
        _kill(device, point, "rollback", "1")
        state = home.state()
        assert {state.good, state.previous} == both, point
        device.wait_for(str(state.good).split("-")[1])
        assert not any(device_problems(home.folder(name)) for name in both), point
    assert device.edgectl("gc").returncode == 0
    assert _names(device.root / "settings") == sorted(f"{name}.json" for name in both)


def test_a_fall_back_killed_at_every_step_leaves_the_good_release_in_service(device: Device, tmp_path: Path) -> None:
    device.bundles = broken(device, tmp_path)
    device.install("1")
    home, good = releases.Home(device.root), device.release("1").name
    steps = _steps(device, "install", "broken")
    tried = max(index for index, step in enumerate(steps) if re.match(r"os.rename .*/\.current.new #1", step)) + 1
    points = [step for step in steps[tried:] if re.match(r"(open|os.rename) /|os.symlink|fcntl|ask #1$", step)]
    assert len(points) >= 6
    for point in points:
        _kill(device, point, "install", "broken")
        assert home.state().good == good, point
        device.wait_for("1")
        assert device.edgectl("gc").returncode == 0, point
        assert home.names() == [good], point
        assert _names(device.root / "settings") == [f"{good}.json"], point


def test_a_first_installation_killed_while_it_is_given_up_leaves_nothing_that_is_served(
    device: Device, tmp_path: Path
) -> None:
    device.bundles = broken(device, tmp_path)
    steps = _steps(device, "install", "broken")
    assert device.edgectl("uninstall").returncode == 0
    settings = next(index for index, step in enumerate(steps) if "/settings/." in step)
    points = [
        step
        for step in steps[settings:]
        if re.match(r"os.kill|subprocess|os.remove .*/(current|service) |open .*/\.state", step)
    ]
    assert len(points) == 5
    for point in points:
        _kill(device, point, "install", "broken")
        _silent(device)
        assert releases.Home(device.root).state().good is None, point
        device.install("1")
        assert device.serves() == "1", point
        assert device.edgectl("uninstall").returncode == 0, point
        assert not device.root.exists(), point


@pytest.fixture
def spare(device: Device) -> Iterator[Path]:
    """A release that nobody needs, and what is kept beside it."""
    device.install("1")
    release = device.root / "releases" / f"tiny-9-x86-cpu-{'0' * 12}"
    yield release
    assert device.serves() == "1"


def _add(spare: Path, device: Device) -> list[Path]:
    if not spare.is_dir():
        shutil.copytree(device.release("1"), spare, copy_function=os.link)
    beside = [f"settings/{spare.name}.json", f"records/{spare.name}.smoke.json", f"tuned/{'0' * 12}-{'a' * 12}.json"]
    for name in beside:
        (device.root / name).parent.mkdir(exist_ok=True)
        (device.root / name).write_text("{}")
    return [spare, *(device.root / name for name in beside)]


def test_clearing_up_killed_at_every_step_is_gone_on_with(device: Device, spare: Path) -> None:
    _add(spare, device)
    steps = [step for step in _steps(device, "gc", "1") if _CHANGES.match(step) or step.startswith("os.remove")]
    named = [step for step in steps if _CHANGES.match(step)]
    assert len(named) >= 8
    for point in [*named, *[step for step in steps if step not in named][::8]]:
        all_of_it = _add(spare, device)
        _kill(device, point, "gc", "1")
        assert device.serves() == "1", point
        assert not any(device_problems(device.root / "releases" / name) for name in releases.Home(device.root).names())
        assert device.edgectl("gc").returncode == 0, point
        assert not any(path.exists() for path in all_of_it), point


def test_uninstall_killed_at_every_step_is_gone_on_with(device: Device, tmp_path: Path) -> None:
    device.install("1")
    saved, home = tmp_path / "saved", releases.Home(device.root)
    shutil.copytree(device.root, saved, symlinks=True, copy_function=os.link)
    steps = [step for step in _steps(device, "uninstall", "1") if re.match(r"os\.|shutil|open /", step)]
    assert not device.root.exists()
    named = [step for step in steps if _CHANGES.match(step)]
    assert len(named) >= 14
    stopping = [step for step in named if step.startswith("os.kill")]
    inside = [step for step in steps if step not in named][::30]
    for point in [*named, *inside]:
        shutil.copytree(saved, device.root, symlinks=True, copy_function=os.link)
        if point in stopping:
            device.install("1")
        _kill(device, point, "uninstall", "1")
        good = home.state().good
        assert good is None or not device_problems(home.folder(good)), point
        if point in inside:
            device.install("1")
            assert device.serves() == "1", point
        if point == named[-1]:
            assert _names(device.root) == []
            device.root.rmdir()
            continue
        assert device.edgectl("uninstall").returncode == 0, point
        assert not device.root.exists(), point
        assert device.serves() is None, point


def test_a_disk_that_is_full_in_the_middle_of_copying_leaves_the_good_release_in_service(
    made: dict[str, Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in made["2"].rglob("*") if path.is_file())
    device = Device(disk / "home", made, serve.free_port())
    with small_disk(disk, needed * 3), uninstalled(device):
        device.install("1")
        free = os.statvfs(disk)
        filler = disk / "filler"
        # It looks as if it fitted, and does not: every file takes whole blocks.
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - needed - 4 * free.f_frsize))
        result = device.edgectl("install", by="2")
        assert result.returncode == 1
        assert result.stderr.splitlines()[-2:] == [
            f"error: {device.root}: No space left on device",
            "hint: free some space, then try again",
        ]
        home = releases.Home(device.root)
        assert _names(home.releases) == [device.release("1").name]
        assert (device.serves(), home.state().failed) == ("1", None)
        filler.unlink()
        device.install("2")
        assert device.serves() == "2"
