"""Two benchmark records side by side: figures, verdicts, conditions, and every input that is not a record."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain import cli
from toolchain.device import bench, measure, probe
from toolchain.errors import ArtifactError
from toolchain.evaluate import bench_compare, bench_compare_text
from toolchain.evaluate.bootstrap import ratio_interval

STEADY = (9.9, 10.0, 10.1, 10.0, 9.95)
DOUBLE = tuple(2 * sample for sample in STEADY)
Metrics = dict[str, tuple[str, tuple[float, ...]]]


def record(metrics: Metrics, **changes: Any) -> dict[str, Any]:
    """A record whose metrics, device and options are made by the device's own code."""
    made = measure.Record(measured=True)
    for name, (unit, samples) in metrics.items():
        made.add(name, unit, samples)
    return {
        "schema_version": bench.SCHEMA_VERSION,
        "measured": True,
        "emulated": None,
        "conclusive": True,
        "inconclusive_because": [],
        "bundle": "sha256:" + "a" * 64,
        "llama_cpp_commit": "c" * 40,
        "model": {"file": "model/m.gguf", "sha256": "d" * 64, "bytes": 5},
        "threads": 2,
        "options": vars(bench.Options()),
        "device": {**probe.probe(), "board": "Raspberry Pi 5", "cpu": "Cortex-A76", "governor": "performance"},
        "memory": {"peak_rss_bytes": 200 * 2**20, "pss_bytes": 100 * 2**20, "served_prompt_tokens": [9]},
        "metrics": made.metrics,
        **changes,
    }


def written(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def compared(folder: Path, a: object, b: object) -> dict[str, Any]:
    return bench_compare.compare(written(folder, "a.json", a), written(folder, "b.json", b))


def toolchain(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolchain.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_doubled_metric_has_the_ratio_two_and_an_interval_around_it(tmp_path: Path) -> None:
    result = compared(
        tmp_path, record({"tg128_tps": ("tokens/s", STEADY)}), record({"tg128_tps": ("tokens/s", DOUBLE)})
    )
    (row,) = result["metrics"]
    assert (row["p50_a"], row["p50_b"], row["ratio"]) == (10.0, 20.0, 2.0)
    assert 2 * 9.9 / 10.1 <= row["low"] < 2 < row["high"] <= 2 * 10.1 / 9.9
    assert (row["samples_a"], row["samples_b"]) == (5, 5)


@pytest.mark.parametrize(
    ("unit", "before", "after", "says"),
    [
        ("tokens/s", STEADY, DOUBLE, "faster"),
        ("tokens/s", DOUBLE, STEADY, "slower"),
        ("s", STEADY, DOUBLE, "slower"),
        ("s", DOUBLE, STEADY, "faster"),
        ("W", STEADY, DOUBLE, "more"),
        ("W", DOUBLE, STEADY, "less"),
        ("s", STEADY, STEADY, "no difference"),
        ("tokens/s", (8.0, 10.0, 12.0, 9.0, 11.0), (8.5, 10.4, 12.2, 9.1, 11.3), "no difference"),
        ("s", STEADY, (10.0,), "undecided"),
    ],
)
def test_the_verdict_knows_which_way_is_better_and_when_the_interval_holds_one(
    tmp_path: Path, unit: str, before: tuple[float, ...], after: tuple[float, ...], says: str
) -> None:
    (row,) = compared(tmp_path, record({"m": (unit, before)}), record({"m": (unit, after)}))["metrics"]
    assert row["verdict"] == says
    if says == "undecided":
        assert (row["low"], row["high"]) == (None, None)
    else:
        assert (row["low"] <= 1 <= row["high"]) == (says == "no difference")


@pytest.mark.parametrize(
    ("interval", "says"), [((1.0, 1.2), "no difference"), ((0.8, 1.0), "no difference"), ((1.001, 1.2), "faster")]
)
def test_an_interval_that_ends_at_one_holds_it(interval: tuple[float, float], says: str) -> None:
    assert bench_compare.verdict("tokens/s", interval) == says


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [
        ((0.0, 0.0, 4.0), (1.0, 2.0, 4.0), None),
        ((0.0, 2.0, 4.0), (1.0, 4.0, 4.0), 2.0),
        ((1.0, 2.0, 4.0), (0.0, 0.0, 0.0), 0.0),
    ],
)
def test_ten_seconds_without_a_token_have_no_ratio_and_do_not_keep_the_rest_from_being_compared(
    tmp_path: Path, before: tuple[float, ...], after: tuple[float, ...], ratio: float | None
) -> None:
    a, b = (record({"sustained_tps": ("tokens/s", rates), "ttft_s": ("s", STEADY)}) for rates in (before, after))
    result = compared(tmp_path, a, b)
    still, other = result["metrics"]
    assert still["ratio"] == ratio
    assert (still["verdict"], still["low"]) == ("slower", 0.0) if 0.0 not in before else ("undecided", None)
    assert (other["ratio"], other["verdict"]) == (1.0, "no difference")
    json.dumps(result, allow_nan=False)
    row = next(line for line in bench_compare_text.render(result).splitlines() if line.startswith("| sustained_tps"))
    assert row.split("|")[5].strip() == ("" if ratio is None else f"{ratio:.3f}")


def test_samples_are_not_paired_by_their_index() -> None:
    """These pairs all have one ratio: a paired interval would have no width."""
    wide = tuple(float(value) for value in range(10, 20))
    low, high = ratio_interval(wide, [1.01 * value for value in wide], seed=0) or (1.01, 1.01)
    assert low < 0.9
    assert high > 1.1


def test_equal_runs_are_seldom_called_different() -> None:
    random = np.random.default_rng(0)
    intervals = [ratio_interval(*(1 + 0.03 * random.standard_normal((2, 5))), seed=0) for _ in range(200)]
    assert sum(not low <= 1 <= high for low, high in filter(None, intervals)) <= 20
    assert None not in intervals


def test_the_same_records_give_the_same_comparison(tmp_path: Path) -> None:
    pair = record({"ttft_s": ("s", STEADY)}), record({"ttft_s": ("s", (9.0, 9.5, 10.5, 11.0))})
    assert compared(tmp_path, *pair) == compared(tmp_path, *pair)


def test_a_record_made_by_the_devices_own_summary_is_read(tmp_path: Path) -> None:
    content = record({}, a_key_of_tomorrow={"x": [1]})
    content["metrics"] = {"ttft_s": {"unit": "s", **measure.summary(STEADY)}}
    found = bench_compare.read_record(written(tmp_path, "a.json", content))
    assert found.metrics["ttft_s"].samples == list(STEADY)
    assert found.device.board == "Raspberry Pi 5"


def test_memory_is_a_plain_ratio_and_null_has_none(tmp_path: Path) -> None:
    metrics: Metrics = {"ttft_s": ("s", STEADY)}
    half = {"peak_rss_bytes": 100 * 2**20, "pss_bytes": None}
    result = compared(tmp_path, record(metrics), record(metrics, memory=half))
    assert result["memory"] == [
        {"name": "peak_rss_bytes", "a": 200 * 2**20, "b": 100 * 2**20, "ratio": 0.5},
        {"name": "pss_bytes", "a": 100 * 2**20, "b": None, "ratio": None},
    ]
    cells = [[cell.strip() for cell in line.split("|")] for line in bench_compare_text.render(result).splitlines()]
    assert ["", "peak_rss", "MiB", "200.0", "100.0", "0.500", "", "", ""] in cells
    assert ["", "pss", "MiB", "100.0", "unknown", "", "", "", ""] in cells


def test_what_differs_what_only_one_has_and_what_a_record_doubts_is_printed(tmp_path: Path) -> None:
    a = record({"pp512_tps": ("tokens/s", STEADY), "ttft_s": ("s", STEADY)})
    b = record(
        {"pp64_tps": ("tokens/s", STEADY), "ttft_s": ("s", DOUBLE)},
        measured=False, emulated="the kernel runs on x86_64, the programs are for aarch64",
        conclusive=False, inconclusive_because=["ttft_s: samples vary by 9.0%"],
        bundle="sha256:" + "b" * 64, model={"sha256": "e" * 64}, llama_cpp_commit="f" * 40, threads=4,
        options=vars(bench.Options(prompt_tokens=64)),
        device={"board": None, "cpu": "Cortex-A76", "governor": "powersave"},
    )  # fmt: skip
    text = bench_compare_text.render(compared(tmp_path, a, b))
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("- ")] == [
        "- bundle: sha256:aaaaaaaaaaaa… in A, sha256:bbbbbbbbbbbb… in B",
        "- model.sha256: dddddddddddd… in A, eeeeeeeeeeee… in B",
        "- llama_cpp_commit: cccccccccccc… in A, ffffffffffff… in B",
        "- threads: 2 in A, 4 in B",
        "- device.board: Raspberry Pi 5 in A, unknown in B",
        "- device.governor: performance in A, powersave in B",
        "- options.prompt_tokens: 512 in A, 64 in B",
        "- measured: yes in A, no in B",
    ]
    assert "Only in A: pp512_tps" in lines
    assert "Only in B: pp64_tps" in lines
    assert lines[-3:] == [
        "A calls itself conclusive.",
        "B was NOT MEASURED ON THE DEVICE: the kernel runs on x86_64, the programs are for aarch64",
        "B calls itself inconclusive: ttft_s: samples vary by 9.0%",
    ]
    row = next(line for line in lines if line.startswith("| ttft "))
    assert [cell.strip() for cell in row.split("|")][2:6] == ["ms", "10000.0", "20000.0", "2.000"]
    assert row.rstrip(" |").endswith("slower")
    assert text.count("| ttft ") == 1
    assert "pp512_tps |" not in text


def test_another_power_mode_and_another_gpu_are_conditions_that_differ(tmp_path: Path) -> None:
    jetson = {"board": "Orin", "cpu": "A78AE", "governor": "schedutil", "power_mode": "15W", "l4t": "36.4.3"}
    other = {**jetson, "power_mode": "MAXN_SUPER", "gpus": ["NVIDIA H200"]}
    metrics: Metrics = {"m": ("s", STEADY)}
    result = compared(tmp_path, record(metrics, device=jetson), record(metrics, device=other))
    assert result["differs"] == [
        {"condition": "device.power_mode", "a": "15W", "b": "MAXN_SUPER"},
        {"condition": "device.gpus", "a": None, "b": ["NVIDIA H200"]},
    ]
    assert result["unknown_in_both"] == []


def test_a_condition_unknown_in_both_is_not_called_equal(tmp_path: Path) -> None:
    content = record({"m": ("s", STEADY)}, device={"board": None, "cpu": "x", "governor": None})
    text = bench_compare_text.render(compared(tmp_path, content, content))
    assert "options do not differ." in text
    assert "Unknown in both, so perhaps different: device.board, device.governor" in text


@pytest.mark.parametrize(("samples", "noted"), [(STEADY, False), (STEADY[:3], True), (STEADY[:1], True)])
def test_few_samples_are_noted(tmp_path: Path, samples: tuple[float, ...], noted: bool) -> None:
    content = record({"m": ("s", samples)})
    assert ("intervals are too narrow" in bench_compare_text.render(compared(tmp_path, content, content))) == noted


GOOD = record({"m": ("s", STEADY)})


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


def sampled(*samples: object, unit: object = "s") -> dict[str, Any]:
    return {**GOOD, "metrics": {"m": {"unit": unit, "samples": list(samples)}}}


BAD = {
    "not JSON": ("{", "not valid JSON: EOF"),
    "empty file": ("", "not valid JSON"),
    "lone surrogate": ('{"schema_version": 1, "x": "\\ud800"}', "not valid JSON"),
    "nested beyond reason": ("[" * 100_000, "not valid JSON"),
    "not an object": ([GOOD], "not a JSON object"),
    "no schema": (without("schema_version"), "no schema_version, so not a benchmark record"),
    "later schema": ({**GOOD, "schema_version": 2}, "has schema_version 2, and 1 is read"),
    "schema as text": ({**GOOD, "schema_version": "1"}, 'has schema_version "1", and 1 is read'),
    "schema as truth": ({**GOOD, "schema_version": True}, "has schema_version true, and 1 is read"),
    "no metrics": (without("metrics"), "metrics: is missing"),
    "other metrics": (record({"n": ("s", STEADY)}), "no metric in common: m against n"),
    "none measured": (record({}), "no metric in common: m against none"),
    "negative": (sampled(1, 2, -3.5), "metrics.m.samples.2: input should be greater than 0 (got -3.5)"),
    "zero": (sampled(0), "metrics.m.samples.0: input should be greater than 0 (got 0)"),
    "NaN": (sampled(1, float("nan")), "metrics.m.samples.1: input should be a finite number (got NaN)"),
    "infinite": (sampled(float("inf")), "metrics.m.samples.0: input should be a finite number"),
    "beyond a float": (sampled(10**400), "metrics.m.samples.0: "),
    "text": (sampled("1"), "metrics.m.samples.0: input should be a valid number"),
    "no samples": (sampled(), "metrics.m.samples: list should have at least 1 item"),
    "samples null": ({**GOOD, "metrics": {"m": {"unit": "s", "samples": None}}}, "metrics.m.samples: "),
    "many bad": (sampled(-1, -2, -3), "(got -1); and 2 more"),
    "other unit": (sampled(1, 2, unit="ms"), "m is in s in A and in ms in B"),
    "memory": ({**GOOD, "memory": {"peak_rss_bytes": 10**400, "pss_bytes": 1}}, "memory.peak_rss_bytes: "),
    "device": ({**GOOD, "device": None}, "device: "),
}


@pytest.mark.parametrize("case", BAD)
def test_an_input_that_cannot_be_compared_is_one_clear_error(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, says = BAD[case]
    good, bad = written(tmp_path, "good.json", GOOD), written(tmp_path, "bad.json", content)
    monkeypatch.setattr(sys, "argv", ["toolchain", "bench", "compare", str(good), str(bad)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (1, "")
    error, hint = output.err.splitlines()
    assert error.startswith("error: ")
    assert says in error
    assert hint.startswith("hint: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none.json", "no such file"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(ArtifactError) as raised:
            bench_compare.read_record(path)
        assert raised.value.message == f"{path}: {says}"
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ArtifactError, match=r"not UTF-8 \(byte 7\)"):
        bench_compare.read_record(tmp_path / "latin.json")


def test_without_numpy_the_error_names_the_extra_to_install(tmp_path: Path) -> None:
    path = str(written(tmp_path, "a.json", GOOD))
    code = "import sys; sys.modules['numpy'] = None; from toolchain import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "compare", path, path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error == "error: intervals need the package 'numpy'"
    assert "[gguf]" in hint


def test_the_command_prints_the_table_or_the_same_as_json(tmp_path: Path) -> None:
    a = written(tmp_path, "a.json", GOOD)
    b = written(tmp_path, "b.json", record({"m": ("s", DOUBLE)}))
    text = toolchain("bench", "compare", a, b)
    assert (text.returncode, text.stderr) == (0, "")
    as_json = toolchain("bench", "compare", a, b, "--json")
    assert (as_json.returncode, as_json.stderr) == (0, "")
    result = json.loads(as_json.stdout)
    assert result == bench_compare.compare(a, b)
    assert text.stdout == bench_compare_text.render(result) + "\n"
    missing = toolchain("bench", "compare", a, tmp_path / "none.json")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.splitlines()[0] == f"error: {tmp_path / 'none.json'}: no such file"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["bench"], 2, "Missing argument 'RECIPE'"),
        (["bench", "none.toml"], 2, "none.toml: no such file"),
        (["bench", "--verify", "none.toml"], 2, "none.toml: no such file"),
        (["bench", "none.toml", "--target", "x86-cpu"], 2, "none.toml: no such file"),
        (["bench", "none.toml", "more"], 2, "unexpected extra argument (more)"),
        (["bench", "compare", "a.json"], 2, "Missing argument 'B'"),
    ],
)
def test_bench_is_still_the_stages_verb(arguments: list[str], code: int, says: str) -> None:
    done = toolchain(*arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
