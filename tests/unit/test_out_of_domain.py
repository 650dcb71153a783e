"""The committed questions from outside the demo's domain, and the script that made them."""

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from toolchain.data.formats import check_disjoint, read_examples

ROOT = Path(__file__).resolve().parent.parent.parent
QUESTIONS = ROOT / "recipes" / "data" / "general" / "questions.jsonl"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_out_of_domain", ROOT / "scripts" / "build_out_of_domain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = _script()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in QUESTIONS.read_text(encoding="ascii").splitlines()]


def test_there_are_fifty_rows_of_each_source_with_its_licence(rows: list[dict[str, str]]) -> None:
    assert Counter((row["source"], row["licence"]) for row in rows) == {
        ("gsm8k", "MIT"): 50,
        ("truthfulqa", "Apache-2.0"): 50,
    }
    assert {key for row in rows for key in row} == {"id", "question", "answer", "source", "licence"}


def test_the_file_is_the_one_that_its_readme_names() -> None:
    readme = QUESTIONS.with_name("README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(QUESTIONS.read_bytes()).hexdigest() in readme
    assert script.WHEEL_SHA256 in readme


def test_text_is_plain_and_filled(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert all(value.strip() == value and value for value in row.values()), row["id"]
        assert len(row["question"] + row["answer"]) <= 900
        assert not re.search(r"<<|####|  ", row["question"] + row["answer"]), row["id"]


def test_every_arithmetic_answer_ends_with_its_number(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert (row["source"] == "gsm8k") == bool(re.search(r"\nThe answer is -?[\d,.]+\.$", row["answer"])), row["id"]


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl"])
def test_no_question_is_one_of_the_demo(name: str) -> None:
    demo, others = (
        read_examples(path, format="auto", need_answer=True, system=None)
        for path in (ROOT / "recipes" / "data" / "technical" / name, QUESTIONS)
    )
    check_disjoint(demo, others)


def test_a_solution_loses_the_calculator_and_ends_in_a_sentence() -> None:
    case = {"prompt": "How many?", "upstream_answer": "It is 5*2=<<5*2=10>>10 now.\n#### 10"}
    assert script.gsm8k(case) == ("How many?", "It is 5*2=10 now.\nThe answer is 10.")


def test_the_true_choice_is_the_answer() -> None:
    assert script.truthfulqa({"question": "Is it?", "choices": ["Yes.", "No."], "expected_index": 1}) == (
        "Is it?",
        "No.",
    )


def test_rows_do_not_depend_on_the_order_of_the_source() -> None:
    lines = [
        json.dumps(
            {"id": f"q-{at:04}", "question": f"Is {at} odd?", "choices": ["Yes.", "No."], "expected_index": at % 2}
        )
        for at in range(60)
    ]
    found = script.rows_of("truthfulqa", "\n".join(lines))
    assert found == script.rows_of("truthfulqa", "\n".join(reversed(lines)))
    assert len(found) == 50


def test_rows_that_do_not_serve_are_left_out_and_too_few_are_an_error() -> None:
    line = {"id": "q-1", "question": "Is it?", "expected_index": 0}
    texts = [json.dumps({**line, "choices": [answer]}) for answer in ("I have no comment.", "Größe", "x" * 900)]
    with pytest.raises(ValueError, match="truthfulqa: 0 rows, 50 are needed"):
        script.rows_of("truthfulqa", "\n".join(texts))


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"other\.whl: SHA-256"):
        script.build(wheel, tmp_path / "out.jsonl")
