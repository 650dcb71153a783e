"""toolchain quadlet: what Podman's own generator makes of the file. Debian 13's Podman 5.4, where none is installed."""

import datetime
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.device import bundles, tiny_chat
from toolchain.bundle import image
from toolchain.device import files, service
from toolchain.gguf.llama_cpp import cache_folder

REFERENCE = "localhost/tiny-x86-cpu:1.0"
INSTALLED = [Path("/usr/libexec/podman/quadlet"), Path("/usr/lib/podman/quadlet")]
SOURCES = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n"


@pytest.fixture(scope="module")
def generator() -> Path:
    """The program that systemd calls for *.container files; fetched once a month, and kept beside the other bases."""
    for path in INSTALLED:
        if path.is_file():
            return path
    month = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m")
    kept = cache_folder() / "tests" / f"quadlet-{month}"
    if not kept.is_file():
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                message = f"neither Podman 4.5 or newer nor {program} is here"
                if os.environ.get("CI"):
                    pytest.fail(message)
                pytest.skip(message)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            _fetch(Path(name))
            (archive,) = Path(name).glob("podman_*.deb")
            subprocess.run(["dpkg-deb", "--extract", str(archive), f"{name}/root"], check=True)
            draft = kept.with_suffix(f".{os.getpid()}")
            shutil.copy(Path(name, "root/usr/libexec/podman/quadlet"), draft)
            draft.rename(kept)
    return kept


def _fetch(folder: Path) -> None:
    """Debian 13's package of Podman, whatever this machine's apt has."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(SOURCES)
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State": folder,
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    apt = ["apt-get", "--quiet=2", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    for command in ("update", "download podman"):
        done = subprocess.run([*apt, *command.split()], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> bundles.Make:
    place = tmp_path_factory.mktemp("bundles")
    return bundles.maker(bundles.install(place / "llama"), tiny_chat.write_gguf(place / "model.gguf"), place)


@pytest.fixture(scope="module")
def bundle(make: bundles.Make) -> Path:
    return make()


def _file(bundle: Path) -> str:
    done = bundles.toolchain("quadlet", str(bundle), "--image", REFERENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _generated(generator: Path, text: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """The service that Podman makes of the file, on stdout."""
    (folder / "tiny.container").write_text(text)
    environment = {"PATH": "/usr/bin:/bin", "QUADLET_UNIT_DIRS": str(folder)}
    return subprocess.run([str(generator), "--dryrun"], env=environment, capture_output=True, text=True, check=False)


def _podman_run(made: str) -> list[str]:
    (line,) = [line for line in made.splitlines() if line.startswith("ExecStart=")]
    return shlex.split(line.removeprefix("ExecStart="))


def test_podman_runs_the_image_confined_with_its_key_and_asks_for_its_health(
    generator: Path, bundle: Path, tmp_path: Path
) -> None:
    made = _generated(generator, _file(bundle), tmp_path)
    assert made.returncode == 0, made.stderr
    argv = _podman_run(made.stdout)
    assert argv[:2] == ["/usr/bin/podman", "run"]
    assert argv[-1] == REFERENCE
    assert {"--read-only", "--security-opt=no-new-privileges", "--stop-timeout=15"} <= set(argv)
    for option, value in (
        ("--publish", "127.0.0.1:8080:8080"),
        ("--secret", "tiny-x86-cpu-key,type=mount,target=/run/secrets/api_key,uid=65532,gid=65532,mode=0400"),
        ("--cap-drop", "all"),
        ("--tmpfs", "/tmp"),
        ("--health-start-period", "120s"),
    ):
        assert argv[argv.index(option) + 1] == value
    # Podman takes an array for the words of a command, if it does not begin with "CMD".
    assert json.loads(argv[argv.index("--health-cmd") + 1]) == image.HEALTH
    assert not [part for part in argv if "nvidia" in part or "autoupdate" in part]


def test_the_container_cannot_grow_beyond_the_bundle_and_starts_with_the_machine(
    generator: Path, bundle: Path, tmp_path: Path
) -> None:
    made = _generated(generator, _file(bundle), tmp_path).stdout
    limit = service.memory_limit_bytes(files.open_bundle(bundle).manifest)
    assert f"MemoryMax={limit}" in made.splitlines()
    assert "--cgroups=split" in _podman_run(made)  # the container is in the service's group, and under its limit
    assert "WantedBy=default.target" in made.splitlines()


def test_a_bundle_for_a_gpu_is_given_it(generator: Path, make: bundles.Make, tmp_path: Path) -> None:
    bundle = make("gpu")
    bundles.promise_cuda(bundle)
    made = _generated(generator, _file(bundle), tmp_path)
    argv = _podman_run(made.stdout)
    assert argv[argv.index("--device") + 1] == "nvidia.com/gpu=all"


def test_the_generator_refuses_a_key_that_it_does_not_know(generator: Path, bundle: Path, tmp_path: Path) -> None:
    made = _generated(generator, _file(bundle).replace("ReadOnly=", "ReadOnlie="), tmp_path)
    assert made.returncode != 0
    assert "unsupported key 'ReadOnlie'" in made.stderr


def test_what_is_no_reference_of_an_image_is_refused(bundle: Path) -> None:
    for reference in ("", "two words", "line\nbreak", "--privileged"):
        done = bundles.toolchain("quadlet", str(bundle), "--image", reference)
        assert done.returncode != 0
        assert "is no image" in done.stderr


def test_what_was_changed_is_not_believed(bundle: Path) -> None:
    presets = bundle / "presets.json"
    presets.write_text(presets.read_text().replace("120.0", "999.0"))
    done = bundles.toolchain("quadlet", str(bundle), "--image", REFERENCE)
    assert done.returncode == 1
    assert "presets.json: changed: SHA-256 differs" in done.stderr
    presets.write_text("[]")
    bundles.reseal(bundle)
    done = bundles.toolchain("quadlet", str(bundle), "--image", REFERENCE)
    assert done.returncode == 1
    assert done.stderr.startswith("error: presets.json does not say how the server is started")
