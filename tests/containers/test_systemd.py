"""edgectl install on a machine whose init is systemd: a container that is booted, rebooted and cut off from power."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.conftest import debian_archive
from tests.containers.engine import Engine
from tests.device import bundles

pytestmark = [pytest.mark.docker, pytest.mark.llama_cpp]
KEY = "a key of this test"
UNIT = "edgectl.service"
CURRENT = "/var/lib/edgectl/current"
WAIT_S = 60.0
"""Far above what anything here takes, for a busy machine."""
EXPOSURE_LIMIT = 4.0
# --privileged asks for every capability, which a machine that is confined itself cannot give; systemd needs these.
BOOTABLE = (
    *("--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN", "--cap-add=SYS_PTRACE", "--cgroupns=private", "--network=none"),
    *(f"--security-opt={name}=unconfined" for name in ("seccomp", "apparmor", "systempaths")),
    # One core, one thread: threads that share their cores with other processes take many times as long.
    "--cpuset-cpus=0",
    *("--tmpfs=/run", "--tmpfs=/tmp", "--stop-signal=SIGRTMIN+3"),
)
# As a kernel hands a machine over: Docker mounts the control groups read-only, those of version 1 each by itself, and
# hides what one mount namespace mounts from the others, by which systemd passes credentials to a service.
BOOT = """
for at in $(findmnt --noheadings --raw --output TARGET --submounts /sys/fs/cgroup); do
    mount -o remount,bind,rw "$at"
done
mount --make-rshared /
exec /lib/systemd/systemd
"""
# Version of the release that answers, or why none does.
ASK = f"""
import json, urllib.request
request = urllib.request.Request("http://127.0.0.1:8080/props", headers={{"Authorization": "Bearer {KEY}"}})
try:
    print(json.load(urllib.request.urlopen(request, timeout=10))["model_path"].split("/tiny-")[1].split("-")[0])
except OSError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def image(docker: Engine) -> str:
    tag = "toolchain-test:systemd"
    loaded = docker.run("import", str(debian_archive("systemd", "python3")), tag)
    assert loaded.returncode == 0, loaded.stderr
    return tag


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama = bundles.x86_llama()
    folder = tmp_path_factory.mktemp("bundles")
    bundles.releases(llama, folder)
    return folder


class Machine:
    """A container with systemd as process 1."""

    def __init__(self, docker: Engine, name: str) -> None:
        self.docker, self.name = docker, name

    def run(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        return self.docker.run("exec", self.name, *argv)

    def says(self, *argv: str) -> str:
        """What a program that succeeds says."""
        done = self.run(*argv)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout.strip()

    def shell(self, script: str) -> str:
        return self.says("sh", "-c", script)

    def edgectl(self, *arguments: str, by: str = "1") -> "subprocess.CompletedProcess[str]":
        return self.run(*edgectl_argv(*arguments, by=by))

    def install(self, version: str, *options: str) -> "subprocess.CompletedProcess[str]":
        done = self.edgectl("install", *options, by=version)
        assert done.returncode == 0, (done.stderr, self.journal())
        return done

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.edgectl("status", "--json").stdout)
        return found

    def boot(self) -> None:
        started = self.docker.run("start", self.name)
        assert started.returncode == 0, started.stderr
        end_s = time.monotonic() + WAIT_S
        while (state := self.run("systemctl", "is-system-running").stdout.strip()) != "running":
            assert state != "degraded", self.run("systemctl", "--failed", "--plain").stdout
            assert time.monotonic() < end_s, (state, self.run("systemctl", "list-jobs").stdout)
            time.sleep(0.1)

    def reboot(self) -> None:
        stopped = self.docker.run("stop", self.name)
        assert stopped.returncode == 0, stopped.stderr
        self.boot()

    def power_cut(self) -> None:
        """Every process is gone at once. (What was not flushed is still there: a container cannot lose that.)"""
        killed = self.docker.run("kill", self.name)
        assert killed.returncode == 0, killed.stderr
        self.boot()

    def serves(self) -> str:
        return self.says("python3", "-I", "-S", "-c", ASK)

    def wait_for(self, version: str) -> None:
        end_s = time.monotonic() + WAIT_S
        while (now := self.serves()) != version:
            assert time.monotonic() < end_s, (now, self.journal())
            time.sleep(0.1)

    def journal(self) -> str:
        return self.run("journalctl", "--unit", UNIT, "--no-pager", "--lines", "60").stdout

    def show(self, name: str) -> str:
        return self.says("systemctl", "show", "--value", "--property", name, UNIT)

    def supervisor(self) -> str:
        return self.show("MainPID")

    def server(self) -> str:
        """Process of llama-server: the supervisor's edgectl's child."""
        pid = self.supervisor()
        return self.shell(f"children() {{ cat /proc/$1/task/$1/children; }}; children $(children {pid})")


def edgectl_argv(*arguments: str, by: str) -> tuple[str, ...]:
    return ("python3", "-I", "-S", f"/bundles/{by}/tiny-{by}-x86-cpu/edgectl", *arguments)


@pytest.fixture
def machine(docker: Engine, image: str, made: Path) -> Iterator[Machine]:
    name = f"toolchain-test-{os.getpid()}-{time.monotonic_ns()}"
    bound = f"--volume={made}:/bundles:ro"
    created = docker.run("create", "--name", name, *BOOTABLE, bound, image, "/bin/sh", "-c", BOOT)
    assert created.returncode == 0, created.stderr
    try:
        machine = Machine(docker, name)
        machine.boot()
        yield machine
    finally:
        docker.run("rm", "--force", name)


def key_file(machine: Machine, name: str, key: str = KEY) -> str:
    """A file that root alone can read."""
    machine.shell(f"umask 077; mkdir -p /etc/edgectl; echo '{key}' > /etc/edgectl/{name}")
    return f"/etc/edgectl/{name}"


def stop_in_mid_trial(machine: Machine, by: str, *options: str) -> None:
    """An installation that tries its release, and has got no further."""
    install = " ".join(edgectl_argv("install", *options, by=by))
    machine.shell(f"""
        {install} > /install.log 2>&1 &
        until grep -q 'trying it' /install.log; do kill -0 $! || exit 1; done
        kill -STOP $!
    """)
    status = machine.status()
    assert (status["on_trial"], status["answers"], status["good"] != status["current"]) == (True, True, True)


def test_it_serves_as_nobody_who_can_write_nothing(machine: Machine) -> None:
    key = key_file(machine, "key")
    machine.shell(f"umask 077; {' '.join(edgectl_argv('install', by='1'))} --api-key-file {key}")
    assert machine.serves() == "1"
    assert "401" in machine.says("python3", "-I", "-S", "-c", ASK.replace(KEY, "another"))
    assert machine.says("stat", "--format=%U %a", key) == "root 600"
    assert (machine.show("ActiveState"), machine.show("UnitFileState")) == ("active", "enabled")
    server = machine.server()
    status = dict(line.split(":\t", 1) for line in machine.says("cat", f"/proc/{server}/status").splitlines())
    # systemd.exec(5), DynamicUser=: from this range.
    assert {61184 <= int(user) <= 65519 for user in status["Uid"].split()} == {True}
    assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == ("0" * 16, "1", "2")
    # As root even, where the server sees its files.
    for folder in ("/var/lib/edgectl", "/var/lib/edgectl/releases", "/etc", "/usr", "/root", "/var", "/dev"):
        written = machine.run("nsenter", f"--target={server}", "--mount", "touch", f"{folder}/x")
        assert "Read-only file system" in written.stderr, (folder, written)
    limit = int(machine.show("MemoryMax"))
    held = machine.shell(f"""
        cat /sys/fs/cgroup/memory/system.slice/{UNIT}/memory.limit_in_bytes 2> /dev/null ||
        cat /sys/fs/cgroup/system.slice/{UNIT}/memory.max""")
    assert 0 <= limit - int(held) < 4096  # the kernel counts pages
    security = machine.says("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    print(security)
    assert float(security.split(": ")[1].split()[0]) < EXPOSURE_LIMIT


def test_releases_take_over_from_each_other_and_leave_nothing_in_the_end(machine: Machine) -> None:
    machine.install("1")
    machine.install("2", "--api-key-file", key_file(machine, "key"))
    assert machine.serves() == "2"
    # The new unit is there before the supervisor sees what it has to serve, and starts the new release once.
    unit, swap = machine.says("stat", "--printf=%.9Z ", f"/etc/systemd/system/{UNIT}", CURRENT).split()
    assert float(unit) < float(swap)
    journal = machine.says("journalctl", "--unit", UNIT, "--no-pager", "--output=cat")
    assert journal.count("settings: the presets'") == 2
    broken = machine.edgectl("install", by="3")
    assert broken.returncode == 3, broken.stderr
    assert "0 of 2 golden prompts stop at eos" in broken.stderr
    assert machine.serves() == "2"
    assert machine.edgectl("rollback").returncode == 0
    assert machine.serves() == "1"
    status = machine.status()
    assert (status["service"], status["service_runs"], status["answers"]) == ("systemd", True, True)
    assert (status["supervisor"]["release"], status["last_failure"]["release"][:6]) == (status["good"], "tiny-3")
    assert machine.edgectl("uninstall").returncode == 0
    assert machine.says("systemctl", "list-units", "--all", "--plain", "--no-legend", "edgectl*") == ""
    assert machine.run("systemctl", "list-unit-files", "--no-legend", "edgectl*").stdout == ""
    assert machine.shell("grep --files-with-matches '[r]eleases/\\|[s]upervise' /proc/[0-9]*/cmdline || true") == ""
    assert machine.run("ls", "/run/edgectl", "/var/lib/edgectl").stdout == ""
    assert machine.says("systemctl", "is-system-running") == "running"


def test_what_is_killed_is_started_again(machine: Machine) -> None:
    machine.install("1")
    server, supervisor = machine.server(), machine.supervisor()
    machine.shell(f"kill -9 {server}")
    machine.wait_for("1")
    assert (machine.server() != server, machine.supervisor() == supervisor) == (True, True)
    server = machine.server()
    machine.shell(f"kill -9 {supervisor}")
    machine.wait_for("1")
    assert (machine.server() != server, machine.supervisor() != supervisor) == (True, True)
    assert machine.show("NRestarts") == "1"
    assert machine.run("test", "-e", f"/proc/{server}").returncode == 1


def test_an_installer_that_is_killed_in_mid_trial_leaves_the_good_release_with_its_own_key(machine: Machine) -> None:
    machine.install("1", "--api-key-file", key_file(machine, "key"))
    stop_in_mid_trial(machine, "3", "--api-key-file", key_file(machine, "other", "another"))
    assert "401" in machine.serves()
    machine.shell("kill -9 $(sed 's/.* //' /var/lib/edgectl/lock)")
    machine.wait_for("1")
    status = machine.status()
    assert (status["on_trial"], status["good"][:6], status["served"]) == (False, "tiny-1", status["good"])
    assert "was broken off and is undone" in machine.install("2").stderr
    assert machine.serves() == "2"


@pytest.mark.parametrize("end", [Machine.reboot, Machine.power_cut])
def test_the_good_release_serves_after_a_reboot_and_a_power_cut_in_mid_trial_too(
    machine: Machine, end: Callable[[Machine], None]
) -> None:
    machine.install("1")
    end(machine)
    machine.wait_for("1")
    stop_in_mid_trial(machine, "3")
    end(machine)
    machine.wait_for("1")
    assert machine.status()["good"][:6] == "tiny-1"


def test_a_first_release_that_was_cut_off_in_its_trial_is_not_served(machine: Machine) -> None:
    stop_in_mid_trial(machine, "3")
    machine.power_cut()
    assert machine.status()["served"] is None
    assert machine.show("ActiveState") == "active"
    machine.install("1")
    assert machine.serves() == "1"


def test_a_home_that_the_services_user_cannot_get_to_is_refused_before_anything_is_copied(machine: Machine) -> None:
    machine.shell("mkdir -m 700 /home/jo")
    refused = machine.edgectl("install", "--home", "/home/jo/edgectl")
    assert refused.returncode == 2, refused.stderr
    assert "the service's user cannot enter /home/jo" in refused.stderr
    assert machine.says("ls", "/home/jo/edgectl/releases") == ""
    machine.shell("chmod o+x /home/jo")
    machine.install("1", "--home", "/home/jo/edgectl")
    assert machine.serves() == "1"
    assert machine.says("systemctl", "is-active", "edgectl-home-jo-edgectl.service") == "active"


def test_a_plain_process_that_was_asked_for_stays_one(machine: Machine) -> None:
    machine.install("1", "--service", "process")
    machine.install("2")
    assert machine.serves() == "2"
    assert machine.status()["service"] == "process"
    assert machine.run("ls", f"/etc/systemd/system/{UNIT}").returncode != 0
