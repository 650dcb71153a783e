"""The engine that the other container tests stand on: it builds, and it confines as a device's compose file asks."""

import os
from pathlib import Path

import pytest

from tests.containers.engine import Engine, NoEngineError, engine

pytestmark = pytest.mark.docker
CONFINED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]


@pytest.fixture(scope="module")
def image(docker: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A static busybox and nothing else, built by BuildKit from no base."""
    context: Path = tmp_path_factory.mktemp("context")
    (context / "busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (context / "busybox").chmod(0o755)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY busybox /bin/sh\nUSER 10001:10001\n")
    built = docker.run("build", "--network", "host", "--tag", "toolchain-test:engine", str(context))
    assert built.returncode == 0, built.stderr
    return "toolchain-test:engine"


def _sh(docker: Engine, image: str, command: str) -> tuple[int, str]:
    done = docker.run("run", "--rm", "--network", "none", *CONFINED, image, "/bin/sh", "-c", command)
    return done.returncode, done.stdout + done.stderr


def test_a_confined_container_writes_to_its_tmpfs_and_nowhere_else(docker: Engine, image: str) -> None:
    assert _sh(docker, image, "echo kept > /tmp/a && read x < /tmp/a && echo $x") == (0, "kept\n")
    code, output = _sh(docker, image, "echo lost > /a")
    assert code != 0
    assert "Read-only file system" in output or "Permission denied" in output


def test_a_confined_container_is_not_root(docker: Engine, image: str) -> None:
    code, output = _sh(
        docker, image, 'while read -r k v; do [ "$k" = Uid: ] && echo $v; done < /proc/self/status; true'
    )
    assert (code, output.split()[0]) == (0, "10001")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start an engine")
def test_an_engine_of_our_own_leaves_no_process_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody-listens")
    with engine() as own:
        root = Path(own.environment["DOCKER_HOST"].removeprefix("unix://")).parent
        process_id = int((root / "pid").read_text())
        assert Path(f"/proc/{process_id}").exists()
    assert not Path(f"/proc/{process_id}").exists()
    assert not root.exists()


def test_without_a_docker_program_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.containers.engine.CLIENTS", ("no-such-program",))
    with pytest.raises(NoEngineError, match="apt-get install docker"), engine():
        pass
