"""Bundles taken to devices by ssh: a real sshd here, whose addresses are devices with a home of their own each."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles, test_install
from tests.device.test_bundle_served import _PYTHON
from toolchain.bundle import deploy
from toolchain.device import files, releases, serve
from toolchain.errors import RecipeError

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
made = test_install.made
_SSHD = Path("/usr/sbin/sshd")
_FIRST, _SECOND, _SILENT = "127.0.0.1", "127.0.0.2", "127.0.0.3"
_WAIT_S = 60.0
"""Far above what is waited for."""


@dataclass
class Site:
    """An sshd, and what our command needs to reach it."""

    root: Path
    port: int
    made: dict[str, Path]

    def device(self, address: str) -> test_install.Device:
        return test_install.Device(self.home(address) / "models", self.made, serve.free_port())

    def home(self, address: str) -> Path:
        return self.root / address

    def incoming(self, address: str) -> Path:
        return self.home(address) / deploy.STAGING

    def argv(self, devices: str, bundle: Path, *options: str, key: str = "user_key") -> list[str]:
        ssh = {
            "Port": str(self.port),
            "IdentityFile": str(self.root / key),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.root / "known_hosts"),
            "StrictHostKeyChecking": "yes",
        }
        words = [sys.executable, "-m", "toolchain.cli", "deploy", devices, str(bundle), "--home", "models"]
        words += ["--service", "process", "--out", str(self.root / "records"), "--json"]
        return [*words, *(word for name, value in ssh.items() for word in ("-o", f"{name}={value}")), *options]

    def deploy(self, devices: str, bundle: Path, *options: str, code: int = 0, key: str = "user_key") -> "Outcomes":
        argv = self.argv(devices, bundle, *options, key=key)
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == code, done.stderr
        return Outcomes(done.stdout, done.stderr)

    def start(self, devices: str, bundle: Path, *options: str) -> "subprocess.Popen[str]":
        argv = self.argv(devices, bundle, *options)
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def clients(self) -> list[str]:
        """Command lines of programs that were started to reach this sshd."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended
            if line.startswith(("ssh ", "rsync ")) and str(self.root) in line:
                found.append(line)
        return found


class Outcomes:
    """What the command printed, by device."""

    def __init__(self, output: str, errors: str) -> None:
        self.report: dict[str, Any] = json.loads(output)
        self.errors = errors
        self.of: dict[str, dict[str, Any]] = {item["device"]: item for item in self.report["devices"]}

    def are(self) -> dict[str, str]:
        return {device: item["outcome"] for device, item in self.of.items()}


def _wait_for(happened: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + _WAIT_S
    while not happened():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


def _keygen(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_name(path.name + ".pub").read_text()


@pytest.fixture
def site(made: dict[str, Path], tmp_path: Path) -> Iterator[Site]:
    missing = [program for program in (str(_SSHD), "rsync", "ssh") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install openssh-server openssh-client rsync")
    root, port = tmp_path / "site", serve.free_port()
    root.mkdir()
    for address in (_FIRST, _SECOND):
        (root / address).mkdir()
    host_key = " ".join(_keygen(root / "host_key").split()[:2])
    (root / "authorized_keys").write_text(_keygen(root / "user_key"))
    _keygen(root / "other_key")
    known = [f"[{address}]:{port} {host_key}\n" for address in (_FIRST, _SECOND, _SILENT)]
    (root / "known_hosts").write_text("".join(known))
    session = root / "session"
    session.write_text(
        f'#!/bin/sh\nset -- $SSH_CONNECTION\nexport HOME="{root}/$3"\ncd && exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    session.chmod(0o755)
    config = {
        "HostKey": root / "host_key",
        "AuthorizedKeysFile": root / "authorized_keys",
        "ForceCommand": session,
        "PermitRootLogin": "yes",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
    }
    lines = [f"{name} {value}\n" for name, value in config.items()]
    lines += [f"ListenAddress {address}:{port}\n" for address in (_FIRST, _SECOND)]
    (root / "sshd_config").write_text("".join(lines))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd, as root, shuts its unprivileged part in
    with (root / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen([str(_SSHD), "-D", "-e", "-f", str(root / "sshd_config")], stderr=log)
    try:
        _wait_for(lambda: _listens(port), (root / "sshd.log").read_text())
        yield Site(root, port, made)
    finally:
        sshd.terminate()
        sshd.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection((_SECOND, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def devices(site: Site) -> Iterator[tuple[test_install.Device, test_install.Device]]:
    """Both with nothing on them."""
    found = site.device(_FIRST), site.device(_SECOND)
    yield found
    for device in found:
        device.edgectl("uninstall")


Devices = tuple[test_install.Device, test_install.Device]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_devices_are_deployed_beside_one_that_cannot_be_reached(site: Site, devices: Devices) -> None:
    for device in devices:
        device.install("1")  # each on a port of its own, which the next release keeps
    outcomes = site.deploy(f"{_FIRST},{_SILENT},{_SECOND}", site.made["2"], code=1)
    assert outcomes.are() == {_FIRST: "installed", _SILENT: "unreachable", _SECOND: "installed"}
    assert [device.serves() for device in devices] == ["2", "2"]
    assert "Connection refused" in outcomes.of[_SILENT]["reason"]
    assert outcomes.report["well"] is False
    manifest = files.open_bundle(site.made["2"]).manifest
    for address, device in zip((_FIRST, _SECOND), devices, strict=True):
        found = outcomes.of[address]
        assert found["release"] == device.release("2").name
        # The programs are those of the release that was there, and the model is nearly its model.
        assert found["sent_bytes"] < min(1_000_000, manifest["model"]["bytes"])
        records = Path(found["records"])
        assert json.loads((records / "install.json").read_text())["previous"] == device.release("1").name
        assert json.loads((records / "info.json").read_text())["bundle"]["bundle_id"] == manifest["bundle_id"]
        assert list(site.incoming(address).iterdir()) == []
        assert f"{address}: starting {device.release('2').name}" in outcomes.errors


def test_a_second_deployment_sends_next_to_nothing_and_what_is_asked_for_is_measured(
    site: Site, devices: Devices
) -> None:
    device, bundle = devices[0], site.made["1"]
    first = site.deploy(_FIRST, bundle, "--port", str(device.port)).of[_FIRST]
    assert (first["outcome"], device.serves()) == ("installed", "1")
    assert first["sent_bytes"] > _bytes(bundle)
    for path in bundle.rglob("*"):
        os.utime(path)  # as after a build of the same bytes on another day
    second = site.deploy(_FIRST, bundle, "--bench").of[_FIRST]
    assert (second["outcome"], device.serves()) == ("was there", "1")
    assert second["sent_bytes"] < 20_000 < files.open_bundle(bundle).manifest["model"]["bytes"]
    record = json.loads((Path(second["records"]) / "bench.json").read_text())
    assert second["tokens_per_s"] == record["metrics"]["served_decode_tps"]["p50"] > 0


def test_a_release_that_is_not_good_is_told_as_rolled_back(site: Site, devices: Devices) -> None:
    device = devices[0]
    device.install("1")
    found = site.deploy(_FIRST, site.made["endless"], code=1).of[_FIRST]
    assert found["outcome"] == "rolled back"
    assert "0 of 2 golden prompts stop at eos" in found["reason"]
    assert found["hint"] == f"{device.release('1').name} serves again"
    assert device.serves() == "1"
    record = json.loads((Path(found["records"]) / "install.json").read_text())
    assert (record["good"], record["release"], record["serves"]) == (False, found["release"], device.release("1").name)
    assert [item["name"] for item in record["smoke"]["checks"] if not item["ok"]] == ["stops at eos"]
    assert list(site.incoming(_FIRST).iterdir()) == []


def test_the_table_says_what_became_of_each(site: Site) -> None:
    argv = [word for word in site.argv(f"{_SILENT},{_FIRST}", site.made["1"], "--port", "0") if word != "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    rows = done.stdout.splitlines()
    assert rows[0].split() == ["device", "outcome", "release", "seconds", "MB", "sent", "tokens/s"]
    assert rows[1].split()[:3] == [_SILENT, "unreachable", "-"]
    assert rows[2].split()[:3] == [_FIRST, "refused", "-"]
    assert rows[3].startswith(f"{_SILENT}: ssh: connect to host {_SILENT} port {site.port}: Connection refused")
    assert "port" in rows[5]


def test_another_key_than_the_devices_know_is_told(site: Site) -> None:
    found = site.deploy(_FIRST, site.made["1"], code=1, key="other_key").of[_FIRST]
    assert found["outcome"] == "unreachable"
    assert "Permission denied (publickey" in found["reason"]


def test_a_bundle_for_another_processor_is_refused_before_it_is_copied(site: Site, tmp_path: Path) -> None:
    copy = tmp_path / "arm"
    shutil.copytree(site.made["1"], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"]["arch"] = "aarch64"
    bundles.reseal(copy, manifest)
    found = site.deploy(_FIRST, copy, code=1).of[_FIRST]
    assert (found["outcome"], found["reason"]) == ("refused", "it is x86_64, the bundle is for aarch64")
    assert list(site.home(_FIRST).iterdir()) == []


def test_a_bundle_that_asks_too_much_of_the_processor_is_refused_before_it_is_copied(
    site: Site, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(site.made["1"], other)
    lacking = bundles.ask_too_much(other)
    found = site.deploy(_FIRST, other, code=1).of[_FIRST]
    assert (found["outcome"], found["sent_bytes"]) == ("refused", None)
    assert found["reason"].startswith("this processor lacks ")
    assert lacking in found["reason"]
    assert list(site.home(_FIRST).iterdir()) == []


def test_a_device_without_rsync_or_python_is_refused_before_anything_is_copied(site: Site, tmp_path: Path) -> None:
    session = site.root / "session"
    text, programs = session.read_text(), tmp_path / "programs"
    programs.mkdir()
    (programs / "sh").symlink_to("/bin/sh")
    session.write_text(text.replace("exec sh", f"PATH={programs} exec sh"))
    found = site.deploy(_FIRST, site.made["1"], code=1).of[_FIRST]
    assert found["outcome"] == "refused"
    assert found["reason"].startswith("no python3 there: ")
    (programs / "python3").symlink_to(_PYTHON)
    found = site.deploy(_FIRST, site.made["1"], code=1).of[_FIRST]
    assert (found["outcome"], found["reason"]) == ("refused", "no rsync there")
    assert list(site.home(_FIRST).iterdir()) == []


def test_what_the_device_requires_is_asked_for_by_path(site: Site) -> None:
    """Paths that are not absolute are the login folder's, there."""
    (site.home(_FIRST) / "signers").write_text(f"a@b {(site.root / 'user_key.pub').read_text()}")
    found = site.deploy(_FIRST, site.made["1"], "--allowed-signers", "signers", code=1).of[_FIRST]
    assert found["outcome"] == "refused"
    assert "signature: " in found["reason"]
    assert not (site.home(_FIRST) / "models" / "current").exists()


def test_a_full_disk_there_is_told_as_that(site: Site) -> None:
    home = site.home(_FIRST)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(home)], check=True)
    try:
        found = site.deploy(_FIRST, site.made["1"], code=1).of[_FIRST]
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)
    assert (found["outcome"], found["reason"]) == ("failed", "while copying: its disk is full")


def test_as_root_it_installs_by_sudo(site: Site, devices: Devices) -> None:
    if subprocess.run(["sudo", "-n", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no sudo that asks for no password: apt-get install sudo, as root")
    device = devices[0]
    # sudo goes by the user's entry in passwd: the login folder of these devices is not that of theirs.
    places = ["--home", str(device.root), "--staging", str(site.root / "staging")]
    found = site.deploy(_FIRST, site.made["1"], "--sudo", "--port", str(device.port), *places).of[_FIRST]
    assert (found["outcome"], device.serves()) == ("installed", "1")
    environment = Path(f"/proc/{device.supervisor}/environ").read_bytes().split(b"\0")
    assert any(line.startswith(b"SUDO_COMMAND=") and b"install --json" in line for line in environment)
    assert list((site.root / "staging").iterdir()) == []


def _partial(site: Site, address: str, at_least: int) -> bool:
    return site.incoming(address).is_dir() and _bytes(site.incoming(address)) >= at_least


def test_killed_in_the_middle_of_copying_it_goes_on_from_there(site: Site, devices: Devices) -> None:
    device, bundle = devices[0], site.made["1"]
    enough = _bytes(bundle) // 3
    with site.start(_FIRST, bundle, "--bwlimit", "8m") as child:
        _wait_for(lambda: _partial(site, _FIRST, enough), "nothing arrives")
        child.kill()
    _wait_for(lambda: not site.clients(), "what copied was left behind")
    assert not (device.root / "current").exists()
    # The rsync there has noticed, and has put what it got where the next one looks for it.
    _wait_for(lambda: not list(site.incoming(_FIRST).rglob(".*.??????")), "rsync's draft stays")
    kept = _bytes(site.incoming(_FIRST))
    assert kept >= enough
    found = site.deploy(_FIRST, bundle, "--port", str(device.port)).of[_FIRST]
    assert (found["outcome"], device.serves()) == ("installed", "1")
    assert found["sent_bytes"] < _bytes(bundle) - 0.9 * kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_child_and_says_how_far_each_device_is(site: Site, number: signal.Signals) -> None:
    with site.start(f"{_FIRST},{_SECOND}", site.made["1"], "--jobs", "1", "--bwlimit", "2m") as child:
        _wait_for(lambda: _partial(site, _FIRST, 1_000_000), "nothing arrives")
        child.send_signal(number)
        output, errors = child.communicate(timeout=_WAIT_S)
    assert child.returncode == (130 if number == signal.SIGINT else 143), errors
    assert site.clients() == []
    outcomes = Outcomes(output, errors)
    assert outcomes.are() == {_FIRST: "interrupted", _SECOND: "interrupted"}
    assert outcomes.of[_FIRST]["reason"] == "while copying: nothing was changed there"
    assert outcomes.of[_FIRST]["hint"] == "what has arrived is kept: deploy again to go on"
    assert outcomes.of[_SECOND]["reason"] == "not begun: nothing was changed there"
    assert "Traceback" not in errors


def test_an_installation_goes_on_there_when_we_are_interrupted_and_that_is_said(site: Site, devices: Devices) -> None:
    device = devices[0]
    with releases.Home(device.root).locked("test"):  # holds the installation up, for up to ten seconds
        child = site.start(_FIRST, site.made["1"], "--port", str(device.port))
        _wait_for(lambda: any(" install --json " in line for line in site.clients()), "it does not install")
        _wait_for(lambda: _runs_there(device), "no edgectl there")
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=_WAIT_S)
    assert child.returncode == 130, errors
    found = Outcomes(output, errors).of[_FIRST]
    assert (found["outcome"], found["reason"]) == ("interrupted", "while installing")
    assert "it goes on there by itself" in found["hint"]
    assert device.wait_for("1") == "1"


def _runs_there(device: test_install.Device) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words[0].endswith("python3") and "install" in words and f"--home={device.root}" in words:
            return True
    return False


def test_a_bundle_that_is_not_whole_here_goes_nowhere(site: Site, tmp_path: Path) -> None:
    copy = tmp_path / "changed"
    shutil.copytree(site.made["1"], copy)
    card = copy / "MODEL_CARD.md"
    card.write_bytes(card.read_bytes().swapcase())
    done = bundles.toolchain("deploy", _FIRST, str(copy), "-o", f"Port={site.port}")
    assert done.returncode == 1
    assert "MODEL_CARD.md: changed" in done.stderr
    assert list(site.home(_FIRST).iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", "a,,b", "a,", "-oProxyCommand=x", "me@-oProxyCommand=x", "-me@host", "a b", "a;b", "$(a)", "a:22", "a/b", "@a",
     "me@", "a\n", "..", "."],
)  # fmt: skip
def test_a_name_that_ssh_or_a_shell_could_misread_is_refused(name: str) -> None:
    with pytest.raises(RecipeError):
        deploy.parse_devices(name)


def test_names_of_devices_are_told_apart() -> None:
    assert deploy.parse_devices("pi@pi5.local,orin,10.0.0.7,root@fe80::1%eth0,::1") == [
        "pi@pi5.local", "orin", "10.0.0.7", "root@fe80::1%eth0", "::1"
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="orin is given twice"):
        deploy.parse_devices("orin,pi,orin")


def test_a_name_that_begins_like_an_option_starts_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    done = bundles.toolchain("deploy", "--", f"-oProxyCommand=touch {witness}", str(made["1"]))
    assert done.returncode == 2
    assert "is not the name of a device" in done.stderr
    assert not witness.exists()
