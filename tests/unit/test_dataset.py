"""The committed data set of the demo, and the functions of the script that made it."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "recipes" / "data" / "technical"
COLUMNS = {"id", "question", "answer", "topic", "source", "licence"}
LICENCES = {"tldr": "CC-BY-4.0", "barem": "MIT", "ruff": "MIT"}

Rows = list[dict[str, str]]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_dataset", ROOT / "scripts" / "build_dataset.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = _script()


def _read(name: str) -> Rows:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="ascii").splitlines()]


@pytest.fixture(scope="module")
def train() -> Rows:
    return _read("train.jsonl")


@pytest.fixture(scope="module")
def held_out() -> Rows:
    return _read("held_out.jsonl")


def test_there_are_enough_rows_for_training_and_for_evaluation(train: Rows, held_out: Rows) -> None:
    assert len(train) >= 300
    assert len(held_out) >= 60


def test_every_row_has_the_columns_filled_and_a_known_licence(train: Rows, held_out: Rows) -> None:
    for row in train + held_out:
        assert set(row) == COLUMNS
        assert all(value.strip() == value and value for value in row.values()), row["id"]
        assert row["licence"] == LICENCES[row["source"]]
        assert row["id"].startswith(row["source"] + "/")


def test_every_question_is_one_plain_sentence_of_five_to_thirty_words(train: Rows, held_out: Rows) -> None:
    for row in train + held_out:
        question = row["question"]
        assert question.endswith("?"), row["id"]
        assert question.count("?") == 1
        assert 5 <= len(question.split()) <= 30, question
        assert not re.search(r"\bthis (rule|command)\b|[\[\]{}`]", question), question


def test_text_is_ascii_without_template_remains(train: Rows, held_out: Rows) -> None:
    for row in train + held_out:
        assert (row["question"] + row["answer"]).isascii()
        assert not re.search(r"\{\{|\[-\w\|", row["answer"]), row["id"]
        assert not re.search(r"\bRuff\b|\bthis rule\b", row["answer"]), row["id"]


def test_every_answer_is_short_and_closes_its_code(train: Rows, held_out: Rows) -> None:
    for row in train + held_out:
        assert 20 <= len(row["answer"]) <= 900, row["id"]
        assert row["answer"].count("`") % 2 == 0, row["id"]
        assert row["answer"].endswith((".", "```", '"')), row["id"]


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl"])
def test_topics_are_balanced(name: str) -> None:
    counts = Counter(row["topic"] for row in _read(name))
    assert set(counts) == {"linux", "python", "kubernetes"}
    assert max(counts.values()) <= 1.25 * min(counts.values())


def test_no_source_item_question_or_answer_occurs_twice(train: Rows, held_out: Rows) -> None:
    rows = train + held_out
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({script.normalised(row["question"]) for row in rows}) == len(rows)
    assert len({row["answer"] for row in rows}) == len(rows)


def test_no_held_out_question_is_nearly_a_training_question(train: Rows, held_out: Rows) -> None:
    nearest = max((script.jaccard(a["question"], b["question"]), a["id"], b["id"]) for a in held_out for b in train)
    assert nearest[0] < 0.8, nearest


def test_no_held_out_command_is_also_the_answer_of_a_training_row(train: Rows, held_out: Rows) -> None:
    def commands(rows: Rows) -> set[str]:
        return {
            code for row in rows if row["topic"] != "python" for code in re.findall(r"`([^`]+ [^`]+)`", row["answer"])
        }

    assert len(commands(held_out)) >= 60
    assert not commands(train) & commands(held_out)


def test_every_row_is_an_item_of_the_selection(train: Rows, held_out: Rows) -> None:
    selected = {item.key: item for item in script.read_selection(DATA / "selection.txt")}
    for row in train + held_out:
        assert selected[row["id"]].question == row["question"]
        assert selected[row["id"]].topic == row["topic"]


def test_the_split_depends_on_the_items_and_not_on_their_order(train: Rows, held_out: Rows) -> None:
    rows = [script.Row(**row) for row in train + held_out]
    again = script.split(rows), script.split(reversed(rows))
    assert again[0] == again[1]
    assert [row.id for row in again[0][1]] == [row["id"] for row in held_out]


@pytest.mark.parametrize(
    ("template", "plain"),
    [
        ("tar xf {{a.tar}} {{[-C|--directory]}} {{path/to/dir}}", "tar xf a.tar --directory path/to/dir"),
        ("systemctl {{start|stop|restart}} {{unit}}", "systemctl start unit"),
        ('curl {{[-d|--data]}} \'{{{"name":"bob"}}}\'', 'curl --data \'{"name":"bob"}\''),
        ("ls {{[-la|-l --all]}}", "ls -l --all"),
        (r"kubectl patch '{\"a\":{\"b\": {{n}}\}\}'", r"kubectl patch '{\"a\":{\"b\": n}}'"),
    ],
)
def test_a_tldr_command_becomes_what_one_would_type(template: str, plain: str) -> None:
    assert script.plain_command(template) == plain


def test_option_letters_and_headings_vanish_from_a_tldr_description() -> None:
    assert script.plain_description("E[x]tract an archive [f]ile") == "Extract an archive file"
    assert script.plain_description("SSH [J]umping: Connect without executio[N]") == "Connect without execution"


def test_the_reason_of_a_rule_keeps_code_and_drops_links_and_linter_talk(tmp_path: Path) -> None:
    explanation = (
        "## What it does\nChecks.\n\n## Why is this bad?\nUse `x[0]`, see [the docs](https://docs.python.org).\n"
        "It is _very_ slow. This rule skips tests.\n\n## Example\n```python\nold\n```\n\n"
        "Use instead:\n```python\nnew()\n```\n"
    )
    path = tmp_path / "ruff.json"
    path.write_text(json.dumps([{"code": "X1", "explanation": explanation}]), encoding="utf-8")
    assert script.ruff_answers(path)("X1") == "Use `x[0]`, see the docs. It is very slow.\n\n```python\nnew()\n```"


def test_a_selection_line_that_is_neither_topic_nor_item_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "selection.txt"
    path.write_text("[linux]\ntldr/tar/1 How do I use tar?\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"selection\.txt:2"):
        list(script.read_selection(path))


def test_rows_that_ask_nearly_the_same_on_both_sides_are_refused(train: Rows, held_out: Rows) -> None:
    rows, others = [script.Row(**row) for row in train], [script.Row(**row) for row in held_out]
    script.check(rows, others)
    copy = {**held_out[0], "question": train[0]["question"].removesuffix("?") + " then?"}
    with pytest.raises(ValueError, match="nearly the same"):
        script.check(rows, [script.Row(**copy), *others[1:]])
