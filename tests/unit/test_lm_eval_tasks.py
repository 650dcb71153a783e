"""The tasks for lm-evaluation-harness in recipes/lm_eval: their data and scores, without the package."""

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = sorted((ROOT / "recipes" / "lm_eval").glob("*.yaml"))


@pytest.fixture(scope="module")
def scores() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scores", ROOT / "recipes" / "lm_eval" / "scores.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sweep_found_the_tasks() -> None:
    assert [path.stem for path in TASKS] == ["technical_answers", "technical_likelihood"]


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_names_its_file_and_reports_what_its_function_gives(path: Path, scores: ModuleType) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^task: (.*)$", text, re.MULTILINE) == [path.stem]
    (data,) = re.findall(r"^ +test: (\S+)", text, re.MULTILINE)
    row = json.loads((ROOT / data).read_text(encoding="utf-8").splitlines()[0])
    assert set(re.findall(r"{{(\w+)}}", text)) == {"question", "answer"} <= set(row)
    (function,) = re.findall(r"!function scores\.(\w+)", text)
    result = ("an answer",) if "generate_until" in text else ((-2.0, False),)
    assert list(getattr(scores, function)(row, result)) == re.findall(r"- metric: (\w+)", text)


def test_an_answer_is_scored_as_compare_does(scores: ModuleType) -> None:
    assert scores.answer_scores({"answer": "Use ls."}, ["use ls"]) == {"token_f1": 1.0, "exact_match": 1.0}


def test_a_likelihood_is_given_per_byte(scores: ModuleType) -> None:
    found = scores.likelihood({"answer": "Größe"}, [(-7 * math.log(2), True)])
    assert found["bits_per_byte"] == pytest.approx(1.0)
