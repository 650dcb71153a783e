"""The device's code on its own: it needs no package, and its arithmetic is right."""

import ast
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

import toolchain.device
from toolchain.device import bench, cli, cores, files, measure, meter, probe, serve
from toolchain.device.client import Streamed
from toolchain.device.errors import DeviceError, UsageError
from toolchain.recipe import Bench

DEVICE = Path(toolchain.device.__file__).parent
MODULES = sorted(DEVICE.glob("*.py"))


def test_the_sweep_found_the_modules() -> None:
    assert {"cli.py", "serve.py", "smoke.py", "bench.py", "edgectl.py"} <= {path.name for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_the_standard_library_and_its_siblings_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            own = path.name == "edgectl.py" and node.module == "device.main"
            assert own or node.module.split(".")[0] in sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1


def test_it_runs_without_site_packages_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(DEVICE, tmp_path / "device", ignore=shutil.ignore_patterns("__pycache__", "edgectl.py"))
    shutil.copyfile(DEVICE / "edgectl.py", tmp_path / "edgectl")
    argv = [sys.executable, "-I", "-S", str(tmp_path / "edgectl"), "--help"]
    result = subprocess.run(argv, env={}, capture_output=True, text=True, check=True)
    assert all(verb in result.stdout for verb in ("serve", "smoke", "bench", "verify", "doctor", "info"))
    assert not list(tmp_path.rglob("__pycache__"))


_ARGUMENTS = {"gate": ["record.json"], "unpack": ["my.tar", "folder"]}


@pytest.mark.parametrize("verb", sorted(set(cli._VERBS) - {"supervise"}))
def test_every_verb_for_people_has_json(verb: str) -> None:
    assert cli._parser(verb).parse_args([verb, *_ARGUMENTS.get(verb, []), "--json"]).json is True


def test_percentiles_interpolate_between_ranks() -> None:
    assert measure.percentile([4, 1, 3, 2], 0.5) == 2.5
    assert measure.percentile([1, 2, 3, 4, 5], 0.95) == pytest.approx(4.8)
    assert measure.percentile([7], 0.95) == 7


def test_a_summary_keeps_the_samples_and_says_how_they_vary() -> None:
    summary = measure.summary([9.0, 10.0, 11.0])
    assert summary["samples"] == [9.0, 10.0, 11.0]
    assert summary["p50"] == 10.0
    assert summary["variation"] == pytest.approx(0.1)
    assert measure.summary([3.0])["variation"] == 0.0


def test_tpot_spans_the_gaps_between_tokens() -> None:
    streamed = Streamed(sent_at_s=1.0)
    for number, at_s in ((1, 1.5), (2, 1.6), (5, 1.9)):
        event = {"choices": [{"delta": {"content": "x"}}], "timings": {"predicted_n": number}}
        streamed.add(event, at_s)
    assert streamed.ttft_s == pytest.approx(0.5)
    assert streamed.tpot_s == pytest.approx(0.1)
    assert streamed.text == "xxx"


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    streamed = Streamed(sent_at_s=0.0)
    with pytest.raises(DeviceError, match="without a single token"):
        _ = streamed.ttft_s
    streamed.add({"choices": [{"delta": {"content": "x"}}], "timings": {"predicted_n": 1}}, 1.0)
    with pytest.raises(DeviceError, match="fewer than two tokens"):
        _ = streamed.tpot_s


def test_an_error_in_the_stream_is_raised() -> None:
    with pytest.raises(DeviceError, match="out of context"):
        Streamed(sent_at_s=0.0).add({"error": {"message": "out of context"}}, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (bench.Options(repetitions=0), "--repetitions 0: at least 1"),
        (bench.Options(generated_tokens=1), "--generated-tokens 1: at least 2"),
        (bench.Options(prompt_tokens=900, generated_tokens=200), "do not fit the context"),
    ],
)
def test_options_of_bench_have_bounds(options: bench.Options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options.check(1024)


def test_placeholders_are_filled_once() -> None:
    filled = serve.fill(["{bundle}/a", "--port", "{port}"], {"bundle": "/odd {port}", "port": "80"})
    assert filled == ["/odd {port}/a", "--port", "80"]


def test_the_environment_cannot_change_the_server() -> None:
    environ = {"PATH": "/bin", "LLAMA_ARG_HOST": "0.0.0.0", "LD_LIBRARY_PATH": "/tmp", "GGML_BACKEND_PATH": "x"}
    cleaned = serve.clean_environment(environ)
    assert cleaned.pop("GLIBC_TUNABLES") == "glibc.malloc.hugetlb=1"
    assert cleaned == {"PATH": "/bin"}
    assert serve.clean_environment({"GLIBC_TUNABLES": "the user's"}) == {"GLIBC_TUNABLES": "the user's"}


def test_threads_are_cores_this_process_may_use() -> None:
    usable = cores.usable_cpus()
    assert 1 <= cores.physical_cores() <= len(usable)
    try:
        os.sched_setaffinity(0, usable[:1])
        assert cores.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, usable)


def test_the_probe_knows_this_machine() -> None:
    facts = probe.probe()
    assert facts["memory_bytes"] > 1 << 28
    assert facts["page_bytes"] == os.sysconf("SC_PAGE_SIZE")
    assert facts["kernel"]


def test_programs_for_another_processor_count_as_emulated() -> None:
    here = os.uname().machine
    assert probe.emulated("riscv64" if here != "riscv64" else "x86_64") is not None


_SPIN = "import sys, time\nwhile time.process_time() < 1: pass\nprint(flush=True)\nsys.stdin.read()"
"""A program that uses one second of processor time, says so, and waits."""


def test_the_meter_counts_children_alive_and_ended_as_our_own() -> None:
    before_s = meter._own_s()
    with subprocess.Popen([sys.executable, "-c", _SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0.9 < meter._own_s() - before_s < 3
        child.communicate()
    assert 0.9 < meter._own_s() - before_s < 3


def test_the_meter_sees_a_program_that_is_not_our_child() -> None:
    spin = "import time\nend = time.monotonic() + 2.5\nwhile time.monotonic() < end: pass"
    # A grandchild whose parent has gone is nobody's child of ours.
    orphan = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {spin!r}])"
    subprocess.run([sys.executable, "-c", orphan], check=True)
    with meter.ForeignCpu() as foreign:
        time.sleep(1.5)
    assert foreign.share > 0.3 / (os.cpu_count() or 1)


def test_defaults_of_bench_are_those_of_the_recipe() -> None:
    assert asdict(bench.Options()) == Bench().model_dump()


def test_a_noisy_or_unsteady_record_says_so() -> None:
    record = measure.Record(measured=True)
    record.add("a_s", "s", [1.0, 1.01, 1.0, 1.01, 1.0])
    record.foreign["part"] = 0.01
    assert record.doubts() == []
    record.add("b_s", "s", [1.0, 1.5, 1.0, 1.5, 1.0])
    record.foreign["part"] = 0.2
    assert len(record.doubts()) == 2


def test_eviction_is_claimed_only_when_the_pages_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    meter.load([path])
    assert meter.resident_share([path]) == 1.0
    meter.evict([path])
    share = meter.resident_share([path])
    assert share is not None
    if (
        subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
        == "tmpfs\n"
    ):
        assert share == 1.0
    else:
        assert share < 0.01


def test_the_id_covers_everything_in_the_manifest() -> None:
    manifest = {"bundle_id": "x", "files": {"a": {"sha256": "0"}}, "quality": None}
    same = {**manifest, "bundle_id": "y"}
    other = {**manifest, "quality": {"kl": 1}}
    assert files.bundle_id(manifest) == files.bundle_id(same) != files.bundle_id(other)
