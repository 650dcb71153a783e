"""Pictures of a quantization: the same bytes each time, and what they say is in them."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from toolchain.evaluate import pictures


def form(size: int, kl: float) -> dict[str, Any]:
    return {"file_bytes": size, "bits_per_weight": size * 8 / 1e7, "kl": kl, "same_top": 0.9}


ALLOCATION: dict[str, Any] = {
    "held_out": {
        "forms": {
            "16-bit": form(20_000_000, 0.0),
            "stock, no matrix": form(5_000_000, 0.05),
            "stock": form(5_000_000, 0.04),
            "error-aware": form(4_990_000, 0.03),
        }
    },
    "search": {
        "sensitivity": {
            "token_embd.weight": 0.01,
            "blk.0.attn_q.weight": 1e-4,
            "blk.1.attn_q.weight": 0.0,
            "blk.1.ffn_up.weight": 2e-3,
        }
    },
    "plan_types": {"token_embd.weight": "Q6_K", "blk.0.attn_q.weight": "Q4_K", "blk.1.ffn_up.weight": "Q5_K"},
}


def test_pictures_are_the_same_bytes_each_time_and_name_forms_and_types(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        assert [path.name for path in pictures.write(ALLOCATION, folder)] == [pictures.SIZE, pictures.SENSITIVITY]
    for name in (pictures.SIZE, pictures.SENSITIVITY):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    sizes, tensors = ((first / name).read_text() for name in (pictures.SIZE, pictures.SENSITIVITY))
    assert "error-aware" in sizes
    assert "16-bit ‖" in sizes
    assert ">16-bit<" not in sizes  # it loses nothing, and has no place on a logarithmic axis
    for said in ("attn_q", "ffn_up", "Q5_K", "token_embd.weight: KL 1.0e-02, Q6_K"):
        assert said in tensors
