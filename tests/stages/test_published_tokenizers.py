"""Verdicts on published tokenizers: Llama 2 and 3, Phi-3 and Qwen2 (published.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")


from tests.stages.published import LLAMA_2, LLAMA_3, PHI_3, QWEN
from toolchain.errors import ModelError
from toolchain.student import vocabulary

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

QWEN_3_5_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _changed(source: Path, folder: Path, *, rows: int, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy with tokenizer.json changed."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((source / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": rows}))
    return folder


def _without_padding(raw: dict[str, Any]) -> None:
    """As Qwen publishes it: the rows that no token has are no tokens."""
    vocabulary = raw["model"]["vocab"]
    raw["model"]["vocab"] = {token: number for token, number in vocabulary.items() if not token.startswith("[PAD")}
    raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["content"].startswith("[PAD")]


@pytest.mark.parametrize("name", [LLAMA_3, PHI_3])
def test_a_published_tokenizer_is_the_same_as_itself(published: Callable[[str], Path], name: str) -> None:
    folder = published(name)
    found = vocabulary.verdict(folder, folder)
    assert (found.verdict, found.prompts) == ("same", None)
    assert found.ids == found.student.rows


@pytest.mark.parametrize(("teacher", "student"), [(LLAMA_3, PHI_3), (QWEN, LLAMA_3)])
def test_families_are_different_and_logits_are_refused(
    published: Callable[[str], Path], tmp_path: Path, teacher: str, student: str
) -> None:
    folders = published(teacher), published(student)
    with pytest.raises(ModelError, match=r"have different tokenizers: .* ids differ, such as") as caught:
        vocabulary.run(method="logits", on_policy=False, teacher=folders[0], student=folders[1], out=tmp_path)
    assert "'answers' or 'uld'" in (caught.value.hint or "")
    vocabulary.run(method="answers", on_policy=False, teacher=folders[0], student=folders[1], out=tmp_path)
    assert vocabulary.read(tmp_path / vocabulary.OUTPUT).verdict == "different"


def test_phi_3_is_llama_2_with_further_added_tokens(published: Callable[[str], Path]) -> None:
    found = vocabulary.verdict(published(LLAMA_2), published(PHI_3))
    assert (found.verdict, found.ids) == ("padded", 32_000)


def test_qwen_in_matrices_of_two_widths_is_padded_to_its_tokens(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    large = _changed(published(QWEN), tmp_path / "7B", rows=152_064, change=_without_padding)
    small = _changed(published(QWEN), tmp_path / "0.5B", rows=151_936, change=_without_padding)
    found = vocabulary.require_common(large, small)
    assert (found.verdict, found.ids, found.prompts) == ("padded", 151_646, None)


def test_qwen_with_the_split_of_qwen_3_5_is_different_though_every_id_and_merge_agrees(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    def resplit(raw: dict[str, Any]) -> None:
        raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": QWEN_3_5_SPLIT}

    newer = _changed(published(QWEN), tmp_path / "newer", rows=151_936, change=resplit)
    found = vocabulary.verdict(published(QWEN), newer)
    assert found.verdict == "different"
    assert "texts are split in another way" in found.reasons[0]


def test_llama_3_without_its_first_merge_is_different_though_every_token_of_its_own_is_split_alike(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    def drop(raw: dict[str, Any]) -> None:
        assert raw["model"]["merges"][0] == ["Ġ", "Ġ"]
        del raw["model"]["merges"][0]

    found = vocabulary.verdict(
        published(LLAMA_3), _changed(published(LLAMA_3), tmp_path / "less", rows=128_256, change=drop)
    )
    assert found.verdict == "different", found.reasons
