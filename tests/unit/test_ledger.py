"""The ledger's arithmetic, gates, and the report, on distributions whose figures are known."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain import report
from toolchain.data.rows import Row
from toolchain.errors import HostError, ModelError
from toolchain.evaluate import ledger
from toolchain.evaluate.bootstrap import paired_interval
from toolchain.evaluate.divergence import kl
from toolchain.evaluate.gates import Gate, GateLimits, check_gates, failed_gates
from toolchain.evaluate.ledger import Form, LedgerRow, score_forms
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


def test_every_figure_of_a_ledger_row(tmp_path: Path) -> None:
    forms = [form("teacher", TEACHER), form("student", STUDENT), form("merged", STUDENT, "student")]
    teacher, student, merged = score_forms(forms, ROWS, 3, tmp_path, Silent())
    assert teacher.kl_to_teacher == pytest.approx(0, abs=1e-7)
    assert teacher.perplexity == pytest.approx((0.5 * 0.8 * 0.6) ** (-1 / 3))
    by_position = kl(TEACHER, STUDENT)
    assert student.kl_to_teacher == pytest.approx(by_position.mean())
    assert student.kl_to_teacher_by_row == pytest.approx([by_position[:2].mean(), by_position[2]])
    assert student.tokens_by_row == (2, 1)
    assert student.perplexity == pytest.approx((0.25 * 0.6 * 0.4) ** (-1 / 3))
    assert student.top1_agreement == pytest.approx(2 / 3)
    assert student.kl_to_previous is None
    assert merged.kl_to_previous == pytest.approx(0, abs=1e-7)
    assert merged.top1_agreement_with_previous == 1.0
    assert list(tmp_path.iterdir()) == [], "scratch files are gone"


def test_without_a_teacher_rows_have_cross_entropy_and_no_kl_to_it(tmp_path: Path) -> None:
    forms = [form("student after", STUDENT), form("merged", TEACHER, "student after")]
    after, merged = score_forms(forms, ROWS, 3, tmp_path, Silent())
    nll = -np.log([0.25 * 0.6, 0.4])
    assert after.cross_entropy == pytest.approx(nll.sum() / 3)
    assert after.perplexity == pytest.approx(np.exp(nll.sum() / 3))
    assert after.cross_entropy_by_row == pytest.approx([nll[0] / 2, nll[1]])
    assert (after.kl_to_teacher, after.top1_agreement, after.kl_to_teacher_by_row) == (None, None, None)
    assert merged.kl_to_previous == pytest.approx(kl(STUDENT, TEACHER).mean(), rel=1e-6)
    gain = ledger.gain_of(after, merged)
    assert gain.judged_by == "cross_entropy"
    assert gain.difference == pytest.approx(after.cross_entropy - merged.cross_entropy)
    assert list(tmp_path.iterdir()) == []


def test_the_gain_is_judged_by_kl_where_there_is_a_teacher(tmp_path: Path) -> None:
    forms = [form("teacher", TEACHER), form("student before", STUDENT), form("student after", TEACHER)]
    _, before, after = score_forms(forms, ROWS, 3, tmp_path, Silent())
    gain = ledger.gain_of(before, after)
    assert (gain.judged_by, gain.before) == ("kl_to_teacher", before.kl_to_teacher)
    by_row = before.kl_to_teacher_by_row
    assert by_row is not None
    # Two rows: a resample can consist of either alone.
    assert (gain.low, gain.high) == pytest.approx(sorted(by_row), rel=1e-5)


def test_the_interval_is_that_of_a_mean_of_many_rows_and_weighs_them_by_their_tokens() -> None:
    samples = np.random.default_rng(7).normal(0.3, 1.0, 400)
    equal = np.full(400, 9)
    found = paired_interval(samples, equal)
    assert found == paired_interval(samples, equal), "seeded"
    half = 1.96 * samples.std() / 20
    assert found == pytest.approx((samples.mean() - half, samples.mean() + half), abs=0.02)
    weighted = paired_interval(np.array([1.0] * 50 + [0.0] * 50), np.array([99] * 50 + [1] * 50))
    assert weighted is not None
    assert weighted[0] > 0.95
    assert paired_interval(samples[:1], equal[:1]) is None


def test_an_answer_token_that_only_the_student_has_is_named() -> None:
    with pytest.raises(ModelError, match="held-out row b has token 2, and only ids below 2 are common"):
        ledger._check_ids(ROWS, 2)


def test_a_head_with_padding_rows_is_compared_over_the_common_ids(tmp_path: Path) -> None:
    padded = np.concatenate([np.log(0.5) + STUDENT, np.log(np.full((3, 1), 0.5, np.float32))], axis=1)
    _, student = score_forms([form("teacher", TEACHER), form("student", padded)], ROWS, 3, tmp_path, Silent())
    assert student.kl_to_teacher == pytest.approx(kl(TEACHER, STUDENT).mean(), rel=1e-5)


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
    with pytest.raises(HostError, match="MiB free, evaluate, for the time of its run, needs"):
        score_forms([form("teacher", TEACHER)], ROWS, 1 << 56, tmp_path, Silent())


LIMITS = GateLimits(distill_max_kl_ratio=0.5, distill_max_ce_ratio=0.9, merge_max_kl=1e-5, convert_max_kl=1e-3)


def a_ledger(
    after: float = 0.4, merged: float = 1e-6, gguf: float = 1e-4, before: float = 1.0, judged_by: str = "kl_to_teacher"
) -> dict[str, Any]:
    def row(name: str, value: float, previous: float | None) -> dict[str, Any]:
        return {"name": name, "kl_to_teacher": None, judged_by: value, "kl_to_previous": previous}

    return {
        "gain": {"judged_by": judged_by},
        "rows": [
            row("student before", before, None),
            row("student after", after, None),
            row("merged", after, merged),
            row("GGUF 16-bit", after, gguf),
        ],
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
        ({"before": 0.0, "after": 0.1}, 1),
        ({"before": 0.0, "after": 0.0}, 0),
        ({"before": 2.0, "after": 1.8, "judged_by": "cross_entropy"}, 0),
        ({"before": 2.0, "after": 1.81, "judged_by": "cross_entropy"}, 1),
    ],
)
def test_gates_fail_above_their_limit_and_on_nan(values: dict[str, Any], failed: int) -> None:
    assert len(failed_gates(check_gates(a_ledger(**values), LIMITS))) == failed


def test_the_gate_of_distillation_says_what_it_is_about() -> None:
    assert check_gates(a_ledger(), LIMITS)[0].name == "KL to the teacher after ÷ before distillation"
    by_ce = check_gates(a_ledger(judged_by="cross_entropy"), LIMITS)[0]
    assert (by_ce.name, by_ce.limit) == ("cross-entropy of the held-out answers after ÷ before distillation", 0.9)


def test_a_gate_says_its_value_and_its_limit() -> None:
    assert str(Gate("KL", 0.51, 0.5)) == "KL: 0.51, limit 0.5"


def a_report(fallbacks: list[dict[str, Any]], *, by_kl: bool = True, rows: int = 2) -> dict[str, Any]:
    row = LedgerRow(
        name="merged",
        parameters=134_500_000,
        adapter_parameters=0,
        bytes=269_100_000,
        cross_entropy=1.03,
        perplexity=2.8,
        kl_to_teacher=0.25 if by_kl else None,
        top1_agreement=0.9 if by_kl else None,
        previous=None,
        kl_to_previous=None,
        top1_agreement_with_previous=None,
        cross_entropy_by_row=(1.03,) * rows,
        kl_to_teacher_by_row=(0.25,) * rows if by_kl else None,
        tokens_by_row=(3,) * rows,
        seconds=1.0,
    )
    quantization = {"file_type": "Q4_K_M", "bits_per_weight": 6.334, "tensor_types": {"F32": 2}, "fallbacks": fallbacks}
    quantization["allocation"] = {"kind": "stock"}
    return {
        "recipe": "tiny",
        "version": "1",
        "ledger": {
            "held_out_rows": rows,
            "answer_tokens": 3 * rows,
            "vocabulary": 3,
            "tokenizers": {"verdict": "same" if by_kl else "different", "reasons": [], "prompts": None},
            "rows": [asdict(row)],
            "gain": asdict(ledger.gain_of(row, row)),
            "quantization": quantization,
        },
        "speed": None,
        "compare": None,
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


def test_the_report_of_a_ledger_without_a_teacher_says_why_and_shows_cross_entropy() -> None:
    text = report.render(a_report([], by_kl=False))
    assert "KL to the teacher is undefined: the verdict on the tokenizers is 'different'" in text
    assert "cross-entropy | perplexity | KL to the row before" in text
    assert "did not lower the cross-entropy of the held-out answers: 1.0300 before, 1.0300 after" in text
    assert "95 % interval 0.0000 to 0.0000" in text
    assert "None" not in text


def test_a_single_held_out_question_has_no_interval() -> None:
    assert "(a single question: no interval)" in report.render(a_report([], rows=1))
