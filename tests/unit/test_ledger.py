"""The ledger's arithmetic, gates, and the report, on distributions whose figures are known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain import report
from toolchain.data.rows import Row
from toolchain.errors import HostError, ModelError
from toolchain.evaluate import ledger
from toolchain.evaluate.gates import Gate, GateLimits, check_gates, failed_gates
from toolchain.evaluate.ledger import Form, LedgerRow, kl_by_position, score_forms
from toolchain.reporter import Silent

ROWS = [
    Row("a", (), "", prompt_ids=(5, 6), answer_ids=(0, 1), finish="stop"),
    Row("b", (), "", prompt_ids=(5,), answer_ids=(2,), finish="length"),
]
TEACHER = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], np.float32))
STUDENT = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]], np.float32))


def form(name: str, logprobs: np.ndarray[Any, Any], previous: str | None = None) -> Form:
    def scores() -> Iterator[np.ndarray[Any, Any]]:
        yield logprobs[:2]
        yield logprobs[2:]

    return Form(name, previous, parameters=10, adapter_parameters=0, bytes=20, scores=scores)


def test_kl_is_that_of_the_definition() -> None:
    p, q = np.exp(TEACHER.astype(np.float64)), np.exp(STUDENT.astype(np.float64))
    expected = (p * np.log(p / q)).sum(axis=1)
    assert kl_by_position(TEACHER, STUDENT) == pytest.approx(expected, rel=1e-6)
    assert kl_by_position(TEACHER, TEACHER) == pytest.approx([0, 0, 0], abs=1e-9)


def test_every_figure_of_a_ledger_row(tmp_path: Path) -> None:
    forms = [form("teacher", TEACHER), form("student", STUDENT), form("merged", STUDENT, "student")]
    teacher, student, merged = score_forms(forms, ROWS, 3, tmp_path, Silent())
    assert teacher.kl_to_teacher == pytest.approx(0, abs=1e-7)
    assert teacher.perplexity == pytest.approx((0.5 * 0.8 * 0.6) ** (-1 / 3))
    kl = kl_by_position(TEACHER, STUDENT)
    assert student.kl_to_teacher == pytest.approx(kl.mean())
    assert student.kl_to_teacher_by_row == pytest.approx([kl[:2].mean(), kl[2]])
    assert student.tokens_by_row == (2, 1)
    assert student.perplexity == pytest.approx((0.25 * 0.6 * 0.4) ** (-1 / 3))
    assert student.top1_agreement == pytest.approx(2 / 3)
    assert student.kl_to_previous is None
    assert merged.kl_to_previous == pytest.approx(0, abs=1e-7)
    assert merged.top1_agreement_with_previous == 1.0
    assert list(tmp_path.iterdir()) == [], "scratch files are gone"


def test_a_head_with_padding_rows_is_compared_over_the_common_ids(tmp_path: Path) -> None:
    padded = np.concatenate([np.log(0.5) + STUDENT, np.log(np.full((3, 1), 0.5, np.float32))], axis=1)
    _, student = score_forms([form("teacher", TEACHER), form("student", padded)], ROWS, 3, tmp_path, Silent())
    assert student.kl_to_teacher == pytest.approx(kl_by_position(TEACHER, STUDENT).mean(), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_with_form_and_row(tmp_path: Path, bad: float) -> None:
    spoilt = STUDENT.copy()
    spoilt[2, 0] = bad
    with pytest.raises(ModelError, match="student: row b gave a score that is not finite"):
        score_forms([form("teacher", TEACHER), form("student", spoilt)], ROWS, 3, tmp_path, Silent())


def test_scores_of_another_length_or_a_smaller_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shape"):
        score_forms([form("teacher", TEACHER[:, :2])], ROWS, 3, tmp_path, Silent())


def test_too_little_disk_for_the_scratch_files_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="evaluate needs"):
        ledger._check_room(tmp_path, needed=1 << 60)


LIMITS = GateLimits(distill_max_kl_ratio=0.5, merge_max_kl=1e-5, convert_max_kl=1e-3)


def a_ledger(after: float = 0.4, merged: float = 1e-6, gguf: float = 1e-4) -> dict[str, Any]:
    def row(name: str, kl: float, previous: float | None) -> dict[str, Any]:
        return {"name": name, "kl_to_teacher": kl, "kl_to_previous": previous}

    return {
        "rows": [
            row("teacher", 0.0, None),
            row("student before", 1.0, None),
            row("student after", after, None),
            row("merged", after, merged),
            row("GGUF 16-bit", after, gguf),
        ]
    }


@pytest.mark.parametrize(
    ("values", "failed"),
    [
        ({}, 0),
        ({"after": 0.5}, 0),
        ({"after": 0.51}, 1),
        ({"merged": 1.1e-5}, 1),
        ({"gguf": 0.01}, 1),
        ({"after": float("nan")}, 1),
        ({"after": 9.0, "merged": 1.0, "gguf": 1.0}, 3),
    ],
)
def test_gates_fail_above_their_limit_and_on_nan(values: dict[str, float], failed: int) -> None:
    assert len(failed_gates(check_gates(a_ledger(**values), LIMITS))) == failed


def test_a_gate_says_its_value_and_its_limit() -> None:
    assert str(Gate("KL", 0.51, 0.5)) == "KL: 0.51, limit 0.5"


def a_report(fallbacks: list[dict[str, Any]]) -> dict[str, Any]:
    row = LedgerRow("teacher", 134_500_000, 0, 269_100_000, 2.8, 0.0, 1.0, None, None, None, (0.0,), (3,), 1.0)
    quantization = {"file_type": "Q4_K_M", "bits_per_weight": 6.334, "tensor_types": {"F32": 2}, "fallbacks": fallbacks}
    return {
        "recipe": "tiny",
        "version": "1",
        "ledger": {
            "held_out_rows": 1,
            "answer_tokens": 3,
            "vocabulary": 3,
            "rows": [json.loads(json.dumps(row.__dict__))],
            "quantization": quantization,
        },
        "gates": [{"name": "KL", "value": 0.6, "limit": 0.5, "passed": False}],
        "targets": {},
        "stages": {"teacher": {"seconds": 1.25, "metrics": {"summary": "134.5 M parameters"}}},
    }


def test_the_report_shows_real_bits_fallbacks_and_failed_gates() -> None:
    fallbacks: list[dict[str, Any]] = [
        {"wanted": "Q4_K", "got": "Q5_0"},
        {"wanted": "Q4_K", "got": "Q5_0"},
        {"wanted": None, "got": "Q8_0"},
    ]
    text = report.render(a_report(fallbacks))
    assert "6.33 bits per weight" in text
    assert "2 × Q4_K → Q5_0" in text
    assert "FAILED: KL = 0.6 (limit 0.5)" in text
    assert "134.5 M" in text
    assert "None" not in text
    assert "Fell back" not in report.render(a_report([]))
