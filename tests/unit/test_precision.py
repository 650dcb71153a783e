"""Which device is taken: a GPU that cannot be used is an error, never a quiet run on the processor."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from toolchain.errors import HostError  # noqa: E402
from toolchain.student import precision  # noqa: E402


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the driver lists, on a host whose torch sees no GPU."""
    monkeypatch.setattr(precision, "_NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "gpus"


def test_without_a_gpu_the_processor_is_taken(gpus: Path) -> None:
    assert precision.pick_device().type == "cpu"
    gpus.mkdir()
    assert precision.pick_device().type == "cpu"


def test_a_gpu_that_torch_cannot_use_is_an_error_unless_it_is_hidden(
    gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gpus / "0000:01:00.0").mkdir(parents=True)
    with pytest.raises(HostError, match="cannot use it"):
        precision.pick_device()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert precision.pick_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(HostError):
        precision.pick_device()
