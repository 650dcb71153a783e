"""Verdicts on tokenizers made in the test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from toolchain.errors import ArtifactError, ModelError
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
    eos: str = "<eos>",
    split: Any = None,
    bos: str | None = None,
) -> Path:
    """A folder with a BPE tokenizer and a config.json, without weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<eos>", *(words or WORDS)]
    backend = Tokenizer(
        models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges or MERGES, unk_token="<unk>")
    )
    backend.pre_tokenizer = split or pre_tokenizers.Whitespace()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.add_tokens(list(extra))
    tokenizer.eos_token = eos
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": width or len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _digest(folder: Path, ids: int) -> str:
    return vocabulary.tokenizer_digest(load.load_tokenizer(folder), ids=ids)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A teacher as above, and a student with what is given changed."""

    def make(**changed: Any) -> tuple[Path, Path]:
        return _checkpoint(tmp_path / "t"), _checkpoint(tmp_path / "s", **changed)

    return make


Pair = Callable[..., tuple[Path, Path]]


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
    assert (found.ids, found.tokenizer) == (0, None)


def test_equal_ids_with_other_merges_are_different(tmp_path: Path) -> None:
    teacher = _checkpoint(tmp_path / "t")
    student = _checkpoint(tmp_path / "s", merges=MERGES[:1] + MERGES[2:])
    found = vocabulary.verdict(teacher, student)
    assert found.verdict == "different"
    assert "split in another way, such as 'The quick" in found.reasons[0]
    assert _digest(teacher, 42) != _digest(student, 42)


@pytest.mark.parametrize("dropped", range(len(MERGES)))
def test_one_merge_that_differs_is_found_whichever_it_is(pair: Pair, dropped: int) -> None:
    merges = [merge for at, merge in enumerate(MERGES) if at != dropped and "th" not in merge]
    assert vocabulary.verdict(*pair(merges=merges)).verdict == "different"


def test_merges_in_another_order_are_found_where_no_single_token_shows_them(tmp_path: Path) -> None:
    words = [*"abc", "ab", "bc"]
    teacher = _checkpoint(tmp_path / "t", words=words, merges=[("a", "b"), ("b", "c")])
    student = _checkpoint(tmp_path / "s", words=words, merges=[("b", "c"), ("a", "b")])
    found = vocabulary.verdict(teacher, student)
    assert found.verdict == "different"
    assert "['ab' 'c' 'b' '<eos>'] for the teacher, ['a' 'bc' 'b' '<eos>'] for the student" in found.reasons[0]


def test_another_pre_tokenizer_is_different(pair: Pair) -> None:
    from tokenizers import pre_tokenizers

    assert vocabulary.verdict(*pair(split=pre_tokenizers.Digits(individual_digits=True))).verdict == "different"


def test_a_special_token_of_another_text_is_different_and_said_to_be_added(tmp_path: Path) -> None:
    folders = [_checkpoint(tmp_path / name, extra=(f"<{name}>",)) for name in ("tool", "call")]
    found = vocabulary.verdict(*folders)
    assert found.verdict == "different"
    assert "1 of 43 ids differ" in found.reasons[0]
    assert found.reasons[0].endswith("all of these are added tokens")


def test_a_token_that_only_one_side_takes_for_added_is_different(tmp_path: Path) -> None:
    words = [*WORDS, "<tool>"]
    teacher = _checkpoint(tmp_path / "t", words=words)
    student = _checkpoint(tmp_path / "s", words=words, extra=("<tool>",))
    assert vocabulary.verdict(teacher, student).verdict == "different"


def test_a_hole_in_the_ids_of_one_side_is_different(tmp_path: Path) -> None:
    teacher = _checkpoint(tmp_path / "t")
    student = _checkpoint(tmp_path / "s")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {k: v + (v > 40) for k, v in tokenizer["model"]["vocab"].items()}
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    (student / "config.json").write_text(json.dumps({"vocab_size": 43}))
    assert "41: 'ow' for the teacher, None for the student" in vocabulary.verdict(teacher, student).reasons[0]


def test_a_bos_that_one_tokenizer_puts_before_a_text_does_not_count(pair: Pair) -> None:
    teacher, student = pair(bos="<eos>")
    ids = [load.load_tokenizer(folder)("the")["input_ids"] for folder in (teacher, student)]
    assert len(ids[1]) == len(ids[0]) + 1, "the student's tokenizer adds one"
    assert vocabulary.verdict(teacher, student).verdict == "same"


def test_another_template_is_reported_beside_the_verdict_and_refused(pair: Pair) -> None:
    teacher, student = pair(template=TEMPLATE + "!")
    found = vocabulary.verdict(teacher, student)
    assert found.verdict == "same"
    assert found.teacher_template != found.student_template
    with pytest.raises(ModelError, match="chat templates differ"):
        vocabulary.require_common(teacher, student)


def test_one_template_that_renders_otherwise_is_refused(pair: Pair) -> None:
    template = TEMPLATE + "{{ eos_token }}"
    folders = pair(template=template, eos="qu")
    _checkpoint(folders[0], template=template)
    with pytest.raises(ModelError, match=r"the same chat template gives .*<eos>' for the teacher and .*qu'"):
        vocabulary.require_common(*folders)


def test_answers_that_end_otherwise_are_refused_unless_the_teacher_ends_so_too(pair: Pair) -> None:
    teacher, student = pair(eos="qu")
    with pytest.raises(ModelError, match=r"the student's answers end with 'qu' \(id 40\), the teacher's with '<eos>'"):
        vocabulary.require_common(teacher, student)
    (teacher / "generation_config.json").write_text('{"eos_token_id": [1, 40]}')
    assert vocabulary.require_common(teacher, student).verdict == "same"


def test_a_prompt_with_a_token_of_the_student_alone_is_refused(tmp_path: Path) -> None:
    template = TEMPLATE + "<tool>"
    teacher = _checkpoint(tmp_path / "t", template=template)
    student = _checkpoint(tmp_path / "s", template=template, extra=("<tool>",))
    assert vocabulary.verdict(teacher, student).verdict == "padded"
    with pytest.raises(ModelError, match=r"a prompt has a token that only the student knows: '<tool>' \(id 42\)"):
        vocabulary.require_common(teacher, student)


def _run(tmp_path: Path, teacher: Path | None, student: Path, **asked: Any) -> tuple[dict[str, Any], Any]:
    arguments: dict[str, Any] = {"method": "logits", "on_policy": False, **asked}
    metrics = vocabulary.run(**arguments, teacher=teacher, student=student, out=tmp_path)
    return metrics, vocabulary.read(tmp_path / vocabulary.OUTPUT)


def test_what_run_writes_is_what_read_gives_back(tmp_path: Path, pair: Pair) -> None:
    teacher, student = pair(width=64)
    metrics, found = _run(tmp_path, teacher, student)
    assert found == vocabulary.verdict(teacher, student)
    assert found.tokenizer == _digest(teacher, found.ids) == _digest(student, found.ids)
    assert metrics["summary"] == "one tokenizer, padded: 42 common ids"
    assert str(tmp_path) not in (tmp_path / vocabulary.OUTPUT).read_text(), "no path: equal models give equal bytes"


@pytest.mark.parametrize("asked", [{"method": "logits"}, {"method": "answers", "on_policy": True}])
def test_different_tokenizers_are_refused_where_a_loss_needs_common_ids(
    tmp_path: Path, pair: Pair, asked: dict[str, Any]
) -> None:
    teacher, student = pair(words=["b", "a", *WORDS[2:]])
    with pytest.raises(ModelError) as caught:
        _run(tmp_path, teacher, student, **asked)
    for part in (str(teacher), str(student), "42 tokens", "such as 2: 'a' for the teacher, 'b' for the student"):
        assert part in caught.value.message
    remedy = "distill.method = 'answers' or 'uld'" if asked["method"] == "logits" else "on_policy.steps = 0"
    assert remedy in (caught.value.hint or "")
    assert "student of the teacher's family" in (caught.value.hint or "")
    assert not (tmp_path / vocabulary.OUTPUT).exists()


@pytest.mark.parametrize("method", ["answers", "uld"])
def test_different_tokenizers_are_fine_without_common_ids(tmp_path: Path, pair: Pair, method: str) -> None:
    metrics, found = _run(tmp_path, *pair(words=["b", "a", *WORDS[2:]], template=TEMPLATE + "!"), method=method)
    assert (found.verdict, found.ids, found.tokenizer) == ("different", 0, None)
    assert metrics["summary"] == "two tokenizers"


def test_uld_between_equal_tokenizers_is_noted(tmp_path: Path, pair: Pair) -> None:
    assert "'logits' would be exact" in _run(tmp_path, *pair(), method="uld")[0]["summary"]


def test_without_a_local_teacher_the_verdict_is_unknown_and_logits_are_refused(tmp_path: Path, pair: Pair) -> None:
    _, student = pair()
    _, found = _run(tmp_path, None, student, method="answers")
    assert (found.verdict, found.ids, found.teacher, found.teacher_template) == ("unknown", 0, None, None)
    assert found.student_template is not None
    with pytest.raises(ModelError, match=r"unknown tokenizers: there is no teacher\.model"):
        _run(tmp_path, None, student)


def test_a_student_with_fewer_rows_than_tokens_is_refused(pair: Pair) -> None:
    teacher, student = pair(width=41)
    with pytest.raises(ModelError, match=r"s: 41 rows by config\.json, but the tokenizer has ids up to 41"):
        vocabulary.verdict(teacher, student)


def test_a_teacher_unpacked_from_a_gguf_without_a_config_has_the_rows_of_its_tokens(pair: Pair) -> None:
    teacher, student = pair(width=64)
    (teacher / "config.json").unlink()
    found = vocabulary.verdict(teacher, student)
    assert found.teacher == vocabulary.Side(42, 42)
    assert (found.verdict, found.ids) == ("padded", 42)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ 1 + 'a' }}"])
def test_a_template_that_cannot_be_rendered_is_a_model_error(pair: Pair, template: str) -> None:
    with pytest.raises(ModelError, match="the chat template cannot be rendered"):
        vocabulary.verdict(*pair(template=template))


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _an_unknown_merge(text: str) -> str:
    raw = json.loads(text)
    raw["model"]["merges"].append(["x!", "y!"])
    return json.dumps(raw)


@pytest.mark.parametrize(
    "spoil", [_cut, _an_unknown_merge, lambda _: "", lambda _: "[]", lambda _: '{"version": "1.0"}']
)
def test_a_damaged_tokenizer_is_a_model_error_of_one_line(pair: Pair, spoil: Callable[[str], str]) -> None:
    teacher, student = pair()
    path = student / "tokenizer.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ModelError, match="s: the tokenizer cannot be loaded") as caught:
        vocabulary.verdict(teacher, student)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"verdict": "same"}', "\x00"])
def test_a_comparison_that_is_damaged_is_an_artifact_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / vocabulary.OUTPUT
    path.write_text(content)
    with pytest.raises(ArtifactError, match="not a comparison of tokenizers"):
        vocabulary.read(path)


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        vocabulary.verdict(tmp_path, tmp_path)
