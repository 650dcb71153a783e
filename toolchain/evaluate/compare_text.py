"""compare.json and timing.json → Markdown that also reads as plain text, and one line."""

from collections.abc import Mapping, Sequence
from typing import Any

_LABELS = {
    "log_likelihood": "log-likelihood of the reference, nats per token",
    "token_f1": "token F1",
    "exact_match": "exact match",
    "similarity": "similarity (cosine of embeddings)",
    "length_within": "length within the window",
    "stopped": "ended with eos",
    "empty": "empty",
    "answer_tokens": "answer tokens",
}
_SHARES = ("exact_match", "length_within", "stopped", "empty")
_FEW = 30
"""Questions below which a bootstrap interval is noticeably too narrow."""
_MODELS = ("teacher", "student before", "student after")


def summary(result: Mapping[str, Any]) -> str:
    """One line: the held-out F1, and what happened out of domain."""
    f1 = result["sets"]["held_out"]["scores"]["token_f1"]
    text = f"F1 to the teacher {f1['before']['mean']:.3f} → {f1['after']['mean']:.3f} ({_change('token_f1', f1)})"
    few = min(len(figures["questions"]) for figures in result["sets"].values())
    warning = f" (only {few} questions)" if few < _FEW else ""
    return f"{text}; out of domain {_forgetting(result)}{warning}"


def render(result: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """The whole of compare.md."""
    conditions = result["conditions"]
    interval = conditions["interval"]
    window = conditions["length_window_tokens"]
    parts = [
        "# Before and after on questions",
        f"Greedy answers of up to {conditions['max_new_tokens']} tokens, repetition penalty "
        f"{conditions['repetition_penalty']:g}, {conditions['decoding_precision']} on {conditions['device']}. "
        f"After − before with its {100 * interval['confidence']:g} % interval ({interval['method']}, "
        f"{interval['resamples']} resamples, seed {interval['seed']}); where that holds 0, no difference is shown.",
        _heading(result, "held_out", "Held-out questions, against the teacher's answers"),
        _scores(result["sets"]["held_out"]["scores"]),
        f"The window is ±{window} tokens around the length of the teacher's answer.",
    ]
    if "out_of_domain" in result["sets"]:
        parts += [
            _heading(result, "out_of_domain", "Other questions, against the answers in their file"),
            _scores(result["sets"]["out_of_domain"]["scores"]),
            f"Out of domain: {_forgetting(result)}.",
        ]
    parts += ["## Size and speed", _costs(result["models"], timing)]
    parts.append(
        "Times are of PyTorch on the host that compared, the models in turn; what a device does is measured by `bench`."
    )
    if result["not_measured"]:
        reasons = [f"- {name}: {reason}" for name, reason in result["not_measured"].items()]
        parts.append("## Not measured\n\n" + "\n".join(reasons))
    return "\n\n".join(parts) + "\n"


def _heading(result: Mapping[str, Any], part: str, text: str) -> str:
    asked, there = len(result["sets"][part]["questions"]), result["conditions"]["questions_available"][part]
    warning = " Too few: their intervals are narrower than they should be." if asked < _FEW else ""
    return f"## {text}\n\n{asked} of {there} questions.{warning}"


def _forgetting(result: Mapping[str, Any]) -> str:
    if "out_of_domain" not in result["sets"]:
        return "not checked"
    entry = result["sets"]["out_of_domain"]["scores"]["log_likelihood"]
    difference = entry["difference"]
    shown = "no change is shown"
    if difference["excludes_zero"]:
        shown = "the student forgot" if difference["mean"] < 0 else "the references became likelier"
    return f"{shown}: {_change('log_likelihood', entry)} nats per token"


def _scores(scores: Mapping[str, Any]) -> str:
    rows = [
        (
            _LABELS[name],
            *(_value(name, entry[who]["mean"]) if who in entry else "" for who in ("teacher", "before", "after")),
            _change(name, entry),
            "yes" if entry["difference"]["excludes_zero"] else "no",
        )
        for name, entry in scores.items()
    ]
    return _table(("", *_MODELS, "after − before", "differs from 0"), rows)


def _value(name: str, value: float) -> str:
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if name == "answer_tokens" else f"{value:.3f}"


def _change(name: str, entry: Mapping[str, Any]) -> str:
    scale, digits = (100, 1) if name in _SHARES else (1, 1 if name == "answer_tokens" else 3)
    mean, low, high = (f"{scale * entry['difference'][key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _costs(models: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    rows = []
    for name in _MODELS:
        if name not in models:
            continue
        times = timing.get(name, {})
        samples = times["answer_seconds"]["samples"] if times else []
        memory = times.get("peak_memory_bytes")
        rows.append(
            (
                name,
                f"{models[name]['parameters'] / 1e6:.1f} M",
                f"{models[name]['weight_bytes'] / 1e6:.1f}",
                f"{times['answer_seconds']['median']:.2f} ({min(samples):.2f} to {max(samples):.2f})"
                if samples
                else "",
                f"{times['tokens_per_second']:.1f}" if times else "",
                f"{times['batched_tokens_per_second']:.1f}" if "batched_tokens_per_second" in times else "",
                "" if memory is None else f"{memory / 2**20:.0f}",
            )
        )
    alone = len(next(iter(timing.values()))["answer_seconds"]["samples"])
    head = (
        "", "parameters", "weights, MB", f"s per answer alone, median (range) of {alone}", "tokens/s alone",
        "tokens/s batched", "peak MiB",
    )  # fmt: skip
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
