"""What smoke makes of a server's log: on a GPU this is seen in tests/device/test_cuda.py."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolchain.bundle import command
from toolchain.device import files, smoke
from toolchain.target import Server, read_target


def _bundle(root: Path, backend: str, gpu_layers: object) -> files.Bundle:
    target = read_target("x86-cpu").model_copy(update={"server": Server.model_validate({"gpu_layers": gpu_layers})})
    presets = command.presets(target, model="model/a.gguf", alias="a", context=512)
    (root / files.PRESETS).write_text(json.dumps(presets))
    return files.Bundle(root, {"runtime": {"backend": backend}}, "0" * 64)


def _server(buffers: dict[str, float], offloaded: str | None) -> Any:
    log = [f"load_tensors: offloaded {offloaded} layers to GPU"] if offloaded else []
    log += [f"load_tensors: {name:>12} model buffer size = {mib:8.2f} MiB" for name, mib in buffers.items()]
    return SimpleNamespace(log=log, libraries=lambda: ["libggml-cuda.so"])


_FEW = {"CPU_Mapped": 60.0, "CUDA0": 25.0}
_MOST = {"CPU_Mapped": 20.0, "CUDA0": 65.0}


@pytest.mark.parametrize(
    ("backend", "gpu_layers", "buffers", "offloaded", "right"),
    [
        ("CUDA", "all", _MOST, "22/22", True),
        ("CUDA", "all", _MOST, "21/22", False),
        ("CUDA", "all", _FEW, "22/22", False),
        ("CUDA", None, _MOST, "22/22", True),
        ("CUDA", 10, _FEW, "10/22", True),
        ("CUDA", 10, _FEW, "9/22", False),
        ("CUDA", 10, {"CPU_Mapped": 60.0}, "10/22", False),
        ("CUDA", 99, _MOST, "22/22", True),
        ("CPU", None, {"CPU_Mapped": 20.0, "CPU_REPACK": 65.0}, None, True),
        ("CPU", None, _MOST, None, False),
    ],
)
def test_weights_lie_where_the_profile_says(
    backend: str, gpu_layers: object, buffers: dict[str, float], offloaded: str | None, right: bool, tmp_path: Path
) -> None:
    found, detail = smoke._backend(_bundle(tmp_path, backend, gpu_layers), _server(buffers, offloaded))
    assert found is right, detail


def test_the_detail_tells_how_many_layers_were_asked_for(tmp_path: Path) -> None:
    _, detail = smoke._backend(_bundle(tmp_path, "CUDA", 10), _server(_FEW, "9/22"))
    assert detail == (
        "CUDA0 holds 25 MiB of weights; loaded: libggml-cuda.so; 9 of 22 layers on the GPU; "
        "CUDA with 10 layers is expected"
    )
