"""Verdicts on tokenizers made in the test."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from toolchain.errors import ModelError
from toolchain.student import load, vocabulary

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789", "th", "the", "qu", "ow"]
MERGES = [("t", "h"), ("th", "e"), ("q", "u"), ("o", "w")]


def _checkpoint(
    folder: Path,
    *,
    words: list[str] | None = None,
    merges: list[tuple[str, str]] | None = None,
    width: int | None = None,
    template: str | None = TEMPLATE,
    extra: tuple[str, ...] = (),
) -> Path:
    """A folder with a BPE tokenizer and a config.json, without weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<eos>", *(words or WORDS)]
    backend = Tokenizer(
        models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges or MERGES, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.add_tokens(list(extra))
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": width or len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _digest(folder: Path, ids: int) -> str:
    return vocabulary.tokenizer_digest(load.load_tokenizer(folder), ids=ids)


def test_the_same_tokenizer_in_equal_widths_is_the_same(tmp_path: Path) -> None:
    found = vocabulary.verdict(_checkpoint(tmp_path / "t"), _checkpoint(tmp_path / "s"))
    assert (found.verdict, found.ids) == ("same", len(WORDS) + 2)


@pytest.mark.parametrize(("teacher", "student"), [(64, 48), (48, 64)])
def test_unequal_width_with_equal_ids_is_padded_and_shares_the_tokens(
    tmp_path: Path, teacher: int, student: int
) -> None:
    folders = _checkpoint(tmp_path / "t", width=teacher), _checkpoint(tmp_path / "s", width=student)
    found = vocabulary.verdict(*folders)
    assert (found.verdict, found.ids) == ("padded", len(WORDS) + 2)
    assert vocabulary.require_common(*folders).ids == found.ids
    assert _digest(folders[0], found.ids) == _digest(folders[1], found.ids)


def test_tokens_after_the_others_are_padding_too(tmp_path: Path) -> None:
    found = vocabulary.verdict(_checkpoint(tmp_path / "t", extra=("<tool>",)), _checkpoint(tmp_path / "s"))
    assert (found.verdict, found.ids) == ("padded", len(WORDS) + 2)


def test_equal_width_with_other_ids_is_different_and_names_one(tmp_path: Path) -> None:
    swapped = ["b", "a", *WORDS[2:]]
    teacher, student = _checkpoint(tmp_path / "t"), _checkpoint(tmp_path / "s", words=swapped)
    found = vocabulary.verdict(teacher, student)
    assert found.verdict == "different"
    assert "2 of 42 ids differ, such as 2: 'a' for the teacher, 'b' for the student" in found.reasons[0]
    with pytest.raises(ModelError, match="have different tokenizers"):
        vocabulary.require_common(teacher, student)


def test_equal_ids_with_other_merges_are_different(tmp_path: Path) -> None:
    teacher = _checkpoint(tmp_path / "t")
    student = _checkpoint(tmp_path / "s", merges=MERGES[:1] + MERGES[2:])
    found = vocabulary.verdict(teacher, student)
    assert found.verdict == "different"
    assert "is split in another way" in found.reasons[0]
    assert _digest(teacher, 42) != _digest(student, 42)


def test_another_template_is_reported_beside_the_verdict_and_refused(tmp_path: Path) -> None:
    teacher, student = _checkpoint(tmp_path / "t"), _checkpoint(tmp_path / "s", template=TEMPLATE + "!")
    found = vocabulary.verdict(teacher, student)
    assert found.verdict == "same"
    assert found.teacher_template != found.student_template
    with pytest.raises(ModelError, match="chat templates differ"):
        vocabulary.require_common(teacher, student)


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        vocabulary.verdict(tmp_path, tmp_path)
