"""The arithmetic of tuning: what is tried, what goes on, what is accepted, and which record may be used."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolchain.device import files, meter, probe, tune, tuned
from toolchain.device.errors import DeviceError, UsageError
from toolchain.device.system import System
from toolchain.device.tune import Block, Candidate, Machine, Pair

_CPU_ARGV = ["llama-server", "--threads", "{threads}"]
_FOUND = [
    "--no-repack",
    "--flash-attn off",
    "--cache-type-k q8_0 --cache-type-v q8_0 --flash-attn on",
    "--spec-type ngram-simple",
    "--spec-type ngram-map-k",
    "--ubatch-size 128",
    "--load-mode none",
]


def _space(machine: Machine, argv: list[str], threads: int, prompt_tokens: int = 256) -> list[str]:
    return [str(candidate) for candidate in tune.space(machine, argv, threads, prompt_tokens)]


def test_four_cores_without_hyper_threads_are_tried_with_three_threads() -> None:
    assert _space(Machine(4, 4, gpu=False), _CPU_ARGV, 4) == ["--threads 3", *_FOUND]


def test_hyper_threads_are_tried_for_everything_and_for_prompts_alone() -> None:
    found = _space(Machine(6, 12, gpu=False), _CPU_ARGV, 6)
    assert found == ["--threads 5", "--threads 12", "--threads-batch 12", *_FOUND]


def test_of_many_cores_a_part_is_tried_for_everything_and_for_tokens_alone() -> None:
    found = _space(Machine(16, 16, gpu=False), _CPU_ARGV, 16)
    half = ["--threads 8", "--threads 8 --threads-batch 16"]
    assert found == ["--threads 15", *half, "--threads 4", "--threads 4 --threads-batch 16", *_FOUND]


def test_a_profiles_own_number_of_threads_is_compared_with_the_cores() -> None:
    found = _space(Machine(2, 2, gpu=False), _CPU_ARGV, 4)
    assert found == ["--threads 2", "--threads 1", *_FOUND]


def test_one_core_is_not_tried_with_no_threads() -> None:
    assert _space(Machine(1, 1, gpu=False), _CPU_ARGV, 1) == _FOUND


def test_a_longer_prompt_than_a_batch_makes_more_batches_worth_a_try() -> None:
    found = _space(Machine(1, 1, gpu=False), _CPU_ARGV, 1, prompt_tokens=257)
    assert [item for item in found if item not in _FOUND] == ["--ubatch-size 256"]


@pytest.mark.parametrize(("layers", "tried"), [("all", []), ("20", ["--n-gpu-layers all"])])
def test_a_gpu_has_layers_and_no_repacking(layers: str, tried: list[str]) -> None:
    found = _space(Machine(6, 6, gpu=True), [*_CPU_ARGV, "--n-gpu-layers", layers], 6)
    assert found == ["--threads 5", *tried, *_FOUND[1:]]


def test_every_candidate_is_one_that_serve_takes() -> None:
    for candidate in tune.space(Machine(6, 12, gpu=True), [*_CPU_ARGV, "--n-gpu-layers", "20"], 6, 512):
        assert tuned.flags(candidate.arguments) is not None


def test_what_is_about_the_same_thing_is_not_combined() -> None:
    threads, kv, flash, batch = (
        Candidate(threads=3),
        Candidate(arguments=("--cache-type-k", "q8_0", "--flash-attn", "on")),
        Candidate(arguments=("--flash-attn", "off")),
        Candidate(arguments=("--ubatch-size", "128")),
    )
    assert kv.with_(flash) is None
    assert threads.with_(Candidate(threads=2)) is None
    assert [str(candidate) for candidate in tune.combinations([threads, flash, batch, kv])] == [
        "--threads 3 --flash-attn off",
        "--threads 3 --ubatch-size 128",
        "--flash-attn off --ubatch-size 128",
        "--threads 3 --flash-attn off --ubatch-size 128",
    ]
    assert [str(candidate) for candidate in tune.combinations([kv, flash])] == []
    assert tune.combinations([threads]) == []


def test_the_better_half_goes_on_the_best_first() -> None:
    one, two, three = (Candidate(threads=count) for count in (1, 2, 3))
    assert tune.upper_half({one: 0.9, two: 1.2, three: 1.1}) == [two, three]
    assert tune.upper_half({one: 0.5}) == [one]
    assert tune.upper_half({}) == []


def test_the_interval_holds_the_mean_and_narrows_with_the_scatter() -> None:
    gain, low, high = tune.interval([1.1, 1.2, 1.3, 1.2, 1.1])
    assert gain == pytest.approx(math.prod([1.1, 1.2, 1.3, 1.2, 1.1]) ** 0.2)
    assert 1.1 <= low < gain < high <= 1.3
    assert tune.interval([1.1, 1.2, 1.3, 1.2, 1.1]) == (gain, low, high)
    assert tune.interval([1.5] * 5) == pytest.approx((1.5, 1.5, 1.5))
    assert tune.interval([0.5, 2.0, 0.5, 2.0, 1.0])[1] < 1 < tune.interval([0.5, 2.0, 0.5, 2.0, 1.0])[2]


def _block(score_s: float, **changed: Any) -> Block:
    block = Block(
        score_s=[score_s],
        ttft_s=[0.1],
        tpot_s=[0.01],
        cold_start_s=1.0,
        peak_rss_bytes=100 << 20,
        foreign_cpu_share=0.0,
        seconds=2.0,
    )
    return replace(block, **changed)


def _pairs(*ratios: float, **changed: Any) -> list[Pair]:
    return [Pair(_block(ratio), _block(1.0, **changed)) for ratio in ratios]


def test_a_gain_in_every_pair_is_accepted() -> None:
    assert tune.verdict(_pairs(1.1, 1.2, 1.1, 1.2, 1.1)) == (None, True)


@pytest.mark.parametrize(
    ("pairs", "reason", "conclusive"),
    [
        (_pairs(1.1, 1.2, 1.1, 1.2), "no time for 5 pairs", False),
        (_pairs(1.3, 0.9, 1.2, 0.8, 1.1), "no gain is certain", True),
        (_pairs(0.9, 0.9, 0.9, 0.9, 0.9), "no gain is certain", True),
        (_pairs(*[1.5] * 5, foreign_cpu_share=3 * meter.MAX_FOREIGN_SHARE), "other programs used", False),
        (_pairs(*[1.5] * 5, peak_rss_bytes=111 << 20), "takes 111 MiB of memory, 110 are allowed", True),
        (_pairs(*[1.5] * 5, cold_start_s=1.3), "starts cold in 1.30 s", True),
    ],
)
def test_the_presets_stay(pairs: list[Pair], reason: str, conclusive: bool) -> None:
    why, own = tune.verdict(pairs)
    assert reason in str(why)
    assert own is conclusive


def test_a_machine_that_is_always_busy_may_be_tuned_as_it_is() -> None:
    busy = _pairs(*[1.5] * 5, foreign_cpu_share=0.5)
    assert tune.verdict(busy, under_load=True) == (None, True)


def test_a_memory_limit_of_ones_own_counts_instead() -> None:
    larger = _pairs(*[1.5] * 5, peak_rss_bytes=150 << 20)
    assert tune.verdict(larger, max_memory_mib=150) == (None, True)
    assert "149 are allowed" in str(tune.verdict(larger, max_memory_mib=149)[0])


@pytest.mark.parametrize("options", [{"minutes": 0}, {"minutes": math.nan}, {"max_memory_mib": 0}])
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        tune.Options(**options).check()


_FACTS: dict[str, Any] = {
    "board": "Raspberry Pi 5 Model B Rev 1.0",
    "cpu": "Cortex-A76",
    "arch": "aarch64",
    "logical_cpus": 4,
    "physical_cores": 4,
    "memory_bytes": 8 << 30,
    "gpus": [],
    "gpu_driver": None,
    "l4t": None,
    "power_mode": None,
    "load_average_1min": 0.1,
}


def test_a_machine_is_known_by_what_it_is_and_not_by_its_state() -> None:
    same = tuned.fingerprint(_FACTS)
    assert tuned.fingerprint({**_FACTS, "load_average_1min": 3.0, "memory_bytes": (8 << 30) - (20 << 20)}) == same
    others: list[tuple[str, Any]] = [("board", "another"), ("cpu", None), ("arch", "x86_64"), ("logical_cpus", 8)]
    others += [("memory_bytes", 4 << 30)]
    others += [("gpus", ["NVIDIA H200"]), ("gpu_driver", "580.65.06"), ("l4t", "36.4.3"), ("power_mode", "25W")]
    assert len({same, *(tuned.fingerprint({**_FACTS, name: value}) for name, value in others)}) == 10
    assert len(tuned.fingerprint(probe.probe())) == 64


def _bundle(root: Path) -> files.Bundle:
    return files.Bundle(root, {"bundle_id": "sha256:" + "a" * 64}, "b" * 64)


def _record(bundle: files.Bundle) -> dict[str, Any]:
    device = tuned.fingerprint(probe.probe())
    settings = {
        "arguments": ["--ubatch-size", "128", "--no-repack"],
        "threads": 3,
        "gain": 1.25,
        "interval": [1.1, 1.4],
        "device": device,
        "bundle": bundle.id,
    }
    return {"schema_version": 1, "bundle": bundle.id, "device": device, "conclusive": True, "tuned": settings}


def _write(home: Path, bundle: files.Bundle, content: str) -> Path:
    path = tuned.record_path(home, bundle.id, tuned.fingerprint(probe.probe()))
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def test_an_accepted_record_is_found_by_bundle_and_machine(tmp_path: Path) -> None:
    bundle, said = _bundle(tmp_path), list[str]()
    assert tuned.find(tmp_path, bundle, said.append) is None
    path = _write(tmp_path, bundle, json.dumps(_record(bundle)))
    assert path.name.startswith("a" * 12 + "-")
    found = tuned.find(tmp_path, bundle, said.append)
    assert found == tuned.Tuned(3, ("--ubatch-size", "128", "--no-repack"), 1.25)
    assert str(found) == "--threads 3 --ubatch-size 128 --no-repack"
    _write(tmp_path, bundle, json.dumps({**_record(bundle), "tuned": None}))
    assert tuned.find(tmp_path, bundle, said.append) is None
    assert said == []


def test_a_record_of_another_driver_or_power_mode_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    bundle, said = _bundle(tmp_path), list[str]()
    other = tuned.fingerprint({**probe.probe(), "gpu_driver": "1", "power_mode": "7W"})
    path = tuned.record_path(tmp_path, bundle.id, other)
    path.parent.mkdir()
    path.write_text(json.dumps(_record(bundle)))
    assert tuned.find(tmp_path, bundle, said.append) is None
    assert said == ["tuned settings are of another machine, driver or power mode: ./edgectl tune looks for this one's"]


_OPEN_MODULE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@builder)  Sun Jul 27"
)


@pytest.mark.parametrize(
    ("version", "driver"),
    [
        (_OPEN_MODULE + "\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)", "580.65.06"),
        ("NVRM version: NVIDIA UNIX aarch64 Kernel Module  540.4.0  Thu Dec 12", "540.4.0"),
        ("no version", None),
        (None, None),
    ],
)
def test_graphics_cards_and_their_driver_are_read_from_the_kernel_module(
    tmp_path: Path, version: str | None, driver: str | None
) -> None:
    card = tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\n")
    if version is not None:
        (card.parents[1] / "version").write_text(version + "\n")
    system = System(tmp_path)
    assert (probe.gpus(system), probe.gpu_driver(system)) == (["NVIDIA H200"], driver)
    assert (probe.gpus(System(card)), probe.gpu_driver(System(card))) == ([], None)


def _changed(record: dict[str, Any], **settings: Any) -> str:
    return json.dumps({**record, "tuned": {**record["tuned"], **settings}})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"arguments": ["--host", "0.0.0.0"]}, "arguments that tuning does not give"),
        ({"arguments": ["--model", "other.gguf"]}, "arguments that tuning does not give"),
        ({"arguments": ["--ubatch-size"]}, "arguments that tuning does not give"),
        ({"arguments": ["--load-mode", "--host"]}, "arguments that tuning does not give"),
        ({"arguments": ["--no-repack", "1"]}, "arguments that tuning does not give"),
        ({"arguments": "--no-repack"}, "is damaged"),
        ({"threads": "3"}, "is damaged"),
        ({"threads": 0}, "is damaged"),
        ({"gain": None}, "is damaged"),
        ({"bundle": "sha256:" + "c" * 64}, "is of another bundle or machine"),
        ({"device": "d" * 64}, "is of another bundle or machine"),
    ],
)
def test_a_record_with_other_settings_is_refused_with_a_line(
    settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    bundle, said = _bundle(tmp_path), list[str]()
    path = _write(tmp_path, bundle, _changed(_record(bundle), **settings))
    assert tuned.find(tmp_path, bundle, said.append) is None
    assert len(said) == 1
    assert said[0].startswith(f"tuned settings are not used: {path} ")
    assert why in said[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"tuned": null}', '{"tuned": 1, "conclusive": true}', "\0"])
def test_a_damaged_record_is_refused_with_a_line(content: str, tmp_path: Path) -> None:
    bundle, said = _bundle(tmp_path), list[str]()
    _write(tmp_path, bundle, content)
    assert tuned.find(tmp_path, bundle, said.append) is None
    assert len(said) == 1
    with pytest.raises(DeviceError, match=r"damaged|schema"):
        tuned.read(tmp_path, bundle, tuned.fingerprint(probe.probe()))
