"""One engine for the layer, and the Debian that its images stand on. In CI a missing engine is a failure, elsewhere a
skip that says why."""

import datetime
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engine import Engine, NoEngineError, engine
from toolchain.gguf.llama_cpp import cache_folder

DEBIAN = "toolchain-test:debian"


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    try:
        with engine() as running:
            yield running
    except NoEngineError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def debian(docker: Engine) -> str:
    """Debian 12 as debootstrap makes it, in place of the one that the Dockerfiles take from a registry."""
    archive = debian_archive()
    loaded = docker.run("import", str(archive), DEBIAN)
    assert loaded.returncode == 0, loaded.stderr
    return DEBIAN


def debian_archive(*packages: str) -> Path:
    """Debian with more `packages`. Made once a month, and kept beside the builds of llama.cpp."""
    month = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m")
    archive = cache_folder() / "tests" / f"{'-'.join(['debian-bookworm', *packages, month])}.tar"
    if not archive.is_file():
        if shutil.which("debootstrap") is None or os.geteuid() != 0:
            message = "a base needs debootstrap, and root: apt-get install debootstrap"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        archive.parent.mkdir(parents=True, exist_ok=True)
        root = archive.with_suffix(f".{os.getpid()}")
        more = [f"--include={','.join(packages)}"] if packages else []
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", *more, "bookworm", str(root)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout[-2000:]
        draft = root.with_suffix(f".{os.getpid()}.tar")
        with tarfile.open(draft, "w") as tar:
            tar.add(root, ".", filter=lambda member: None if member.ischr() or member.isblk() else member)
        draft.rename(archive)
        shutil.rmtree(root)
    return archive
