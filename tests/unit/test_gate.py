"""Budgets and what a record says to them; energy, bandwidth and windows that records are made of."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from toolchain.bundle import command
from toolchain.device import bandwidth, bench, energy, files, gate, measure
from toolchain.device.errors import DeviceError, UsageError
from toolchain.device.system import System
from toolchain.recipe import Bench
from toolchain.target import Budgets, read_target, targets

BUNDLE = "sha256:" + "a" * 64
FREE: dict[str, Any] = {"throttling": {"now": [], "since_boot": None}}


def bundle(tmp_path: Path, **budgets: Any) -> files.Bundle:
    (tmp_path / "presets.json").write_text(
        json.dumps(
            {"server": {"argv": [], "ready_timeout_s": 1}, "budgets": Budgets(**budgets).model_dump(exclude_none=True)}
        )
    )
    manifest = {"bundle_id": BUNDLE, "target": {"name": "board"}}
    return files.Bundle(tmp_path, manifest, "0" * 64)


def record(**changes: Any) -> dict[str, Any]:
    made = measure.Record(measured=True)
    made.add("tg128_tps", "tokens/s", [10.0, 10.1, 9.9, 10.0, 10.0])
    made.add("pp512_tps", "tokens/s", [100.0, 101.0, 99.0, 100.0, 100.0])
    made.add("ttft_s", "s", [0.5, 0.51, 0.5, 0.5, 0.5])
    made.add("cold_start_evicted_s", "s", [2.0, 2.02, 2.01, 2.01, 2.0])
    made.foreign["llama-bench"] = 0.01
    return {
        "schema_version": bench.SCHEMA_VERSION,
        "bundle": BUNDLE,
        "measured": True,
        "emulated": None,
        "options": vars(bench.Options()),
        "model": {"bytes": 100},
        "memory": {"peak_rss_bytes": 150},
        "page_cache": {"eviction_verified": True},
        "roofline": {"pct": 60.0},
        "sustained": None,
        "device": {"power_mode": "15W", "throttling": {"now": [], "since_boot": []}},
        "device_after": {"power_mode": "15W", "throttling": None},
        "foreign_cpu_share": made.foreign,
        "metrics": made.metrics,
        **changes,
    }


@pytest.mark.parametrize(
    ("budgets", "verdict"),
    [
        ({"decode_tps": 9.0}, "passed"),
        ({"decode_tps": 11.0}, "failed"),
        ({"prefill_tps": 100.0}, "passed"),
        ({"ttft_s": 0.6}, "passed"),
        ({"ttft_s": 0.4}, "failed"),
        ({"cold_start_s": 2.01}, "failed"),  # the 95th percentile is 2.019
        ({"cold_start_s": 2.02}, "passed"),
        ({"memory_x_model": 1.5}, "passed"),
        ({"memory_x_model": 1.4}, "failed"),
        ({"roofline_pct": 60.0}, "passed"),
        ({"roofline_pct": 61.0}, "failed"),
        ({"sustained_ratio": 0.9}, "inconclusive"),
        ({"decode_tps": 9.0, "ttft_s": 0.4}, "failed"),
        ({"decode_tps": 9.0, "sustained_ratio": 0.9}, "inconclusive"),
        ({"decode_tps": 9.0, "power_mode": "15W"}, "passed"),
        ({"decode_tps": 9.0, "power_mode": "25W"}, "inconclusive"),
        ({"decode_tps": 9.0, "power_mode": ("25W", "15W")}, "passed"),
        ({"decode_tps": 9.0, "power_mode": ("25W", "MAXN")}, "inconclusive"),
    ],
)
def test_every_budget_is_held_against_its_figure(tmp_path: Path, budgets: dict[str, Any], verdict: str) -> None:
    assert gate.judge(bundle(tmp_path, **budgets), record())["verdict"] == verdict


@pytest.mark.parametrize(
    "changes",
    [
        {"options": [1]},
        {"device": [1]},
        {"roofline": 5},
        {"page_cache": "x"},
        {"model": {"bytes": "x"}},
        {"metrics": {"tg128_tps": [1]}},
        {"roofline": {"pct": 10**500}},
    ],
)
def test_a_record_that_bench_cannot_have_written_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    held = bundle(tmp_path, decode_tps=9.0, cold_start_s=9.0, memory_x_model=2.0, roofline_pct=9.0)
    with pytest.raises(UsageError, match="not a record as bench writes it"):
        gate.judge(held, record(**changes))


def test_every_budget_of_a_profile_is_known_to_the_device(tmp_path: Path) -> None:
    for name in Budgets.model_fields:
        value: Any = "15W" if name == "power_mode" else 1.0
        report = gate.judge(
            bundle(tmp_path, decode_tps=1.0, **({} if name == "decode_tps" else {name: value})), record()
        )
        assert {row["budget"] for row in report["budgets"]} == {"decode_tps", name} - {"power_mode"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"measured": False, "emulated": "by qemu"}, "not measured on the device: by qemu"),
        ({"device": {"throttling": {"now": ["under-voltage"]}}}, "throttled: under-voltage"),
        ({"device_after": {"throttling": {"now": ["throttled"]}}}, "throttled: throttled"),
        ({"throttled": {"llama-bench": ["throttled"]}}, "throttled: throttled"),
        ({"sustained": {"states": [FREE, {"throttling": {"now": ["cpufreq at 3 of 10"]}}]}}, "cpufreq at 3 of 10"),
        ({"device_after": {"throttling": {"now": [], "since_boot": ["under-voltage"]}}}, "throttled: under-voltage"),
        ({"device_after": {"power_mode": "7W", "throttling": None}}, "the power mode changed: 15W, 7W"),
        ({"sustained": {"states": [{**FREE, "power_mode": "7W"}]}}, "the power mode changed: 15W, 7W"),
        ({"foreign_cpu_share": {"llama-bench": 0.2}}, "other programs used 20.0% of the processors"),
    ],
)
@pytest.mark.parametrize("limit", [9.0, 11.0])
def test_a_doubtful_record_neither_passes_nor_fails(
    tmp_path: Path, changes: dict[str, Any], reason: str, limit: float
) -> None:
    report = gate.judge(bundle(tmp_path, decode_tps=limit), record(**changes))
    assert report["verdict"] == "inconclusive"
    assert reason in gate.table(report)


def test_what_was_throttled_before_the_run_does_not_count(tmp_path: Path) -> None:
    earlier: dict[str, Any] = {"power_mode": "15W", "throttling": {"now": [], "since_boot": ["cores too hot, 2 times"]}}
    held = bundle(tmp_path, decode_tps=9.0)
    assert gate.judge(held, record(device=earlier, device_after=earlier))["verdict"] == "passed"
    again = {**earlier, "throttling": {"now": [], "since_boot": ["cores too hot, 3 times"]}}
    report = gate.judge(held, record(device=earlier, device_after=again))
    assert (report["verdict"], report["doubts"]) == ("inconclusive", ["throttled: cores too hot, 3 times"])


def test_budgets_for_a_power_mode_are_not_for_an_unknown_one_at_the_end(tmp_path: Path) -> None:
    held = bundle(tmp_path, decode_tps=9.0, power_mode=("15W",))
    assert gate.judge(held, record())["verdict"] == "passed"
    report = gate.judge(held, record(device_after={"throttling": None}))
    assert report["doubts"] == ["the power mode is unknown, the budgets are for 15W"]


def test_a_clock_that_is_held_down_in_the_middle_of_a_part_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_WATCH_S", 0.02)
    device = "/sys/class/thermal/cooling_device0"
    system = write(tmp_path, {f"{device}/type": "cpufreq-cpu0", f"{device}/cur_state": "0", f"{device}/max_state": "9"})
    with measure.Throttling(system) as free:
        time.sleep(0.1)
    with measure.Throttling(system) as held:
        time.sleep(0.1)
        write(tmp_path, {f"{device}/cur_state": "3"})
        end_s = time.monotonic() + 10
        while not held.reasons and time.monotonic() < end_s:
            time.sleep(0.01)
        write(tmp_path, {f"{device}/cur_state": "0"})
        time.sleep(0.1)
    assert (free.reasons, held.reasons) == ([], ["cpufreq-cpu0 at 3 of 9"])


def test_samples_that_vary_are_inconclusive(tmp_path: Path) -> None:
    made = measure.Record(measured=True)
    made.add("tg128_tps", "tokens/s", [10.0, 12.0, 14.0, 12.0, 12.0])
    report = gate.judge(bundle(tmp_path, decode_tps=1.0), record(metrics=made.metrics))
    assert report["verdict"] == "inconclusive"
    assert report["budgets"][0]["because"] == ["tg128_tps: samples vary by 11.8%"]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("budgets", [{"decode_tps": 1.0}, {"ttft_s": 9.0}, {"cold_start_s": 9.0}, {"roofline_pct": 1}])
def test_few_samples_are_inconclusive_however_alike(tmp_path: Path, count: int, budgets: dict[str, Any]) -> None:
    made = measure.Record(measured=True)
    for name, unit in (("tg128_tps", "tokens/s"), ("ttft_s", "s"), ("cold_start_evicted_s", "s")):
        made.add(name, unit, [2.0] * count)
    report = gate.judge(bundle(tmp_path, **budgets), record(metrics=made.metrics))
    assert report["verdict"] == "inconclusive"
    assert "at least 5 are needed" in gate.table(report)
    assert len(made.doubts()) == 3


def test_clients_that_ask_at_once_wait_for_each_other_and_that_is_no_doubt() -> None:
    made = measure.Record(measured=True)
    made.add("ttft_2_clients_s", "s", [0.5, 1.0] * 5, alike=False)
    assert made.doubts() == []
    made.add("ttft_s", "s", [0.5, 1.0] * 5)
    assert made.doubts() == ["ttft_s: samples vary by 35.1%"]


def test_an_unverified_eviction_and_a_model_in_the_cache_are_inconclusive(tmp_path: Path) -> None:
    cold = gate.judge(bundle(tmp_path, cold_start_s=9.0), record(page_cache={"eviction_verified": False}))
    assert cold["verdict"] == "inconclusive"
    roof = gate.judge(bundle(tmp_path, roofline_pct=50.0), record(roofline={"pct": 235.0}))
    assert roof["verdict"] == "inconclusive"


def test_no_budgets_and_another_bundle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the target board has no budgets"):
        gate.judge(bundle(tmp_path), record())
    with pytest.raises(UsageError, match="the record is of another bundle"):
        gate.judge(bundle(tmp_path, decode_tps=1.0), record(bundle="sha256:" + "b" * 64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a benchmark record"),
        ("[" * 100_000, "not JSON"),
        ('{"metrics": {}, "schema_version": 7}', "has schema version 7, this edgectl reads 1"),
        ('{"metrics": {}}', "has schema version None"),
        (None, "no such file"),
    ],
)
def test_what_is_no_record_is_one_clear_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        gate.read_record(path)


def write(root: Path, files_: dict[str, str]) -> System:
    for name, text in files_.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return System(root)


def test_energy_of_rapl_counts_packages_once_and_survives_the_counters_end(tmp_path: Path) -> None:
    zone = "/sys/class/powercap/intel-rapl:0"
    system = write(
        tmp_path,
        {
            f"{zone}/energy_uj": "9000000",
            f"{zone}/max_energy_range_uj": "10000000",
            "/sys/class/powercap/intel-rapl:0:0/energy_uj": "1",
            "/sys/class/powercap/intel-rapl:1/energy_uj": "0",
        },
    )
    with energy.Meter(system) as used:
        write(tmp_path, {f"{zone}/energy_uj": "2000000", "/sys/class/powercap/intel-rapl:1/energy_uj": "500000"})
    assert used.joules == pytest.approx(3.5)
    assert used.source == "RAPL, processor packages"


def test_energy_of_a_jetson_is_the_integral_over_its_input_rail(tmp_path: Path) -> None:
    sensor = "/sys/class/hwmon/hwmon3"
    system = write(
        tmp_path,
        {f"{sensor}/in1_label": "VDD_IN", f"{sensor}/in1_input": "5000", f"{sensor}/curr1_input": "2000"},
    )
    with energy.Meter(system) as used:
        time.sleep(0.9)
    assert used.joules is not None
    assert 10 * 0.2 <= used.joules <= 10 * 5
    assert used.source.startswith("VDD_IN")


def test_where_nothing_tells_energy_is_unknown(tmp_path: Path) -> None:
    with energy.Meter(System(tmp_path)) as used:
        pass
    assert (used.joules, used.source) == (None, "no sensor that can be read")
    assert energy.integral([(0.0, 10.0), (1.0, 20.0), (3.0, 20.0)]) == pytest.approx(55.0)
    assert energy.integral([(0.0, 10.0)]) is None


def test_bandwidth_is_that_of_a_memory_and_not_of_a_cache_or_of_a_page_of_zeros() -> None:
    found = bandwidth.read_gb_per_s(1)
    assert found is not None
    assert 0.2 < found < 400


def test_tokens_are_counted_by_windows_and_a_pause_is_seen() -> None:
    arrived = [(second / 10, 1) for second in range(100)] + [(15.0, 20), (29.9, 5), (30.0, 99)]
    assert measure.per_window(arrived, 30.0) == [10.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("arrived", "rates", "ratio"),
    [
        ([(12.0, 5), (25.0, 40)], [0.0, 0.5, 4.0], None),  # its first answer took longer than a window
        ([(29.9, 40)], [0.0, 0.0, 4.0], None),
        ([(31.0, 40)], [0.0, 0.0, 0.0], None),
        ([(5.0, 40), (15.0, 30), (25.0, 20)], [4.0, 3.0, 2.0], 0.5),
        ([(5.0, 40)], [4.0, 0.0, 0.0], 0.0),
    ],
)
def test_a_device_so_slow_that_nothing_came_at_first_has_no_ratio(
    arrived: list[tuple[float, int]], rates: list[float], ratio: float | None
) -> None:
    assert measure.per_window(arrived, 30.0) == rates
    assert measure.last_to_first(rates) == ratio


@pytest.mark.parametrize(
    ("rates", "verdict", "reason"),
    [
        ([10.0] * 6 + [9.0] * 6, "passed", None),
        ([10.0] * 5 + [9.0] * 5, "passed", None),
        ([10.0] * 6 + [7.0] * 6, "failed", None),
        ([10.0] * 4 + [9.0] * 5, "inconclusive", "first and last minute, ten seconds each: 4 samples, at least 5"),
        ([0.0] * 4 + [9.0] * 8, "inconclusive", "nothing came in the first minute"),
    ],
)
def test_a_sustained_run_is_judged_by_its_first_and_last_minute(
    tmp_path: Path, rates: list[float], verdict: str, reason: str | None
) -> None:
    made = measure.Record(measured=True)
    made.add("sustained_tps", "tokens/s", rates)
    ran = {"minutes": len(rates) / 6, "last_to_first": measure.last_to_first(rates)}
    report = gate.judge(bundle(tmp_path, sustained_ratio=0.8), record(sustained=ran, metrics=made.metrics))
    assert report["verdict"] == verdict
    assert reason is None or reason in gate.table(report)
    assert reason is not None or report["budgets"][0]["because"] == []


def with_regime(tmp_path: Path, **options: Any) -> files.Bundle:
    target = read_target("x86-cpu").model_copy(update={"bench": Bench(**options)})
    presets = command.presets(target, model="m", alias="a", context=4096)
    (tmp_path / "presets.json").write_text(json.dumps(presets))
    return files.Bundle(tmp_path, {}, "0" * 64)


def test_a_bundle_is_measured_as_its_target_says(tmp_path: Path) -> None:
    assert bench.regime(with_regime(tmp_path)) == bench.Options()
    given: dict[str, Any] = {"depth": 1024, "clients": (1, 3), "sustained_minutes": 10.0, "cool_down_s": 60.0}
    assert bench.regime(with_regime(tmp_path, **given)) == bench.Options(**given)
    presets = json.loads((tmp_path / "presets.json").read_text())
    del presets["bench"]["options"]  # as bundles had it before
    (tmp_path / "presets.json").write_text(json.dumps(presets))
    assert bench.regime(files.Bundle(tmp_path, {}, "0" * 64)) == bench.Options()


@pytest.mark.parametrize(
    "wrong", [{"tokens": 5}, {"depth": "5"}, {"depth": 5.5}, {"depth": True}, {"clients": 1}, {"clients": [1.5]}]
)
def test_a_regime_that_is_not_known_is_one_clear_error(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with_regime(tmp_path)
    presets = json.loads((tmp_path / "presets.json").read_text())
    presets["bench"]["options"] |= wrong
    (tmp_path / "presets.json").write_text(json.dumps(presets))
    with pytest.raises(DeviceError, match=f"presets.json has a bench option '{next(iter(wrong))}'"):
        bench.regime(files.Bundle(tmp_path, {}, "0" * 64))


def test_what_a_recipe_gives_comes_before_its_target(tmp_path: Path) -> None:
    of_target = Bench(repetitions=9, sustained_minutes=10.0)
    assert Bench(repetitions=5).or_else(of_target) == Bench(repetitions=5, sustained_minutes=10.0)
    assert Bench().or_else(of_target) == of_target


@pytest.mark.parametrize("name", targets())
def test_a_profile_that_asks_for_a_sustained_run_has_one_in_its_regime(name: str) -> None:
    profile = read_target(name)
    if profile.budgets.sustained_ratio is not None and name != "x86-cpu":  # where ten minutes more are the demo's
        assert 60 * profile.bench.sustained_minutes >= 2 * measure.FEWEST_SAMPLES * 10


def test_the_long_context_fits_the_bundle() -> None:
    options = bench.Options()
    assert options.depth_within(4096) == 2048
    assert options.depth_within(2048) == 1920
    assert options.depth_within(128) == 0
    assert bench.Options(depth=0).depth_within(4096) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (bench.Options(depth=-1), "--depth -1: at least 0"),
        (bench.Options(clients=(2, 4)), "--clients 2,4: numbers from 1 to 64, the first of them 1"),
        (bench.Options(clients=(1, 0)), "--clients 1,0"),
        (bench.Options(sustained_minutes=0.1), "--sustained 0.1: from 0.5 to 600 minutes"),
        (bench.Options(sustained_minutes=float("nan")), "--sustained nan"),
        (bench.Options(cool_down_s=-1), "--cool-down -1: from 0 to 3600 seconds"),
        (bench.Options(cool_down_s=float("nan")), "--cool-down nan"),
    ],
)
def test_more_options_of_bench_have_bounds(options: bench.Options, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        options.check(4096)
