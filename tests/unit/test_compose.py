"""docker/compose.yaml: what confines the services that it starts, read as Compose reads it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from toolchain.bundle.minimal_base import CUDA_ENV

yaml = pytest.importorskip("yaml")
FILE = Path(__file__).resolve().parents[2] / "docker" / "compose.yaml"


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
    return found


def test_every_service_is_confined_and_none_starts_unasked(services: dict[str, Any]) -> None:
    assert set(services) == {"train", "device", "jetson"}
    for name, service in services.items():
        assert service["profiles"] == [name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges"]


@pytest.mark.parametrize("name", ["device", "jetson"])
def test_what_serves_has_a_limit_for_memory_and_a_key_and_is_open_to_this_host_alone(
    services: dict[str, Any], name: str
) -> None:
    service = services[name]
    assert service["mem_limit"] == service["memswap_limit"] == "${MEMORY:-4g}"
    assert service["secrets"] == ["api_key"]
    assert service["ports"] == ["${ADDRESS:-127.0.0.1}:8080:8080"]
    assert service["restart"] == "unless-stopped"


def test_a_jetson_differs_in_the_gpu_alone(services: dict[str, Any]) -> None:
    device, jetson = services["device"], services["jetson"]
    assert {key for key in jetson if jetson[key] != device.get(key)} == {"image", "profiles", "runtime", "environment"}
    assert jetson["runtime"] == "nvidia"
    assert [f"{key}={value}" for key, value in jetson["environment"].items()] == CUDA_ENV


def _has_compose() -> bool:
    """Its second version, which comes with the engine's client; the first reads no default within a default."""
    asked = ["docker", "compose", "version"]
    return (
        shutil.which("docker") is not None and subprocess.run(asked, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("name", ["train", "device", "jetson"])
def test_compose_takes_it(tmp_path: Path, name: str) -> None:
    if not _has_compose():
        pytest.skip("no docker compose")
    argv = ["docker", "compose", "--file", str(FILE), "--profile", name, "config", "--services"]
    environment = {**os.environ, "PWD": str(tmp_path), "MEMORY": "3g"}
    read = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    assert name in read.stdout.split()
