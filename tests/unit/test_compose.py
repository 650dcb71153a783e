"""docker/compose.yaml: what confines the services that it starts, read as Compose reads it."""

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
