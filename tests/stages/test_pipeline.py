"""The stages one after the other on a tiny model, through the command line: reuse, reasons, kills, bad input."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.device.test_bundle_image import saved
from tests.stages.recipe_files import command, make_recipe, toolchain
from toolchain.artifact import Manifest, lock, open_artifact
from toolchain.bundle import archive, image
from toolchain.errors import HostError
from toolchain.gguf import llama_cpp
from toolchain.pipeline import STAGE_NAMES, host_cmake
from toolchain.reporter import Silent

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

IN_THIS_RECIPE = tuple(name for name in STAGE_NAMES if name not in ("on_policy", "forms"))
FORMS = ("--set", 'bundle.forms=["archive", "image"]', "--set")
UP_TO_GGUF = IN_THIS_RECIPE[: IN_THIS_RECIPE.index("evaluate") + 1]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        llama_cpp.find(host_cmake())
    except HostError as error:
        pytest.skip(f"{error.message}: {error.hint}")


def digests(work: Path) -> dict[str, str]:
    """Content digest of every committed artifact, by stage; of `compare`, which also holds times, its scores."""
    found = {
        path.parent.parent.name: open_artifact(path.parent, verify=True) for path in work.glob("*/*/manifest.json")
    }
    return {
        name: artifact.manifest.files["compare.json"].sha256 if name == "compare" else artifact.digest
        for name, artifact in found.items()
    }


def manifest_of(work: Path, stage: str) -> Manifest:
    (path,) = (work / stage).glob("*/manifest.json")
    return open_artifact(path.parent).manifest


def test_every_stage_leaves_an_artifact_whose_manifest_says_how(done: Path) -> None:
    work = done.parent / "work"
    assert set(digests(work)) == set(UP_TO_GGUF)
    for stage in UP_TO_GGUF:
        manifest = manifest_of(work, stage)
        assert manifest.stage == stage
        assert manifest.metrics["summary"]
        assert manifest.inputs
    assert manifest_of(work, "distill").metrics["engine"] == "transformers"
    assert not list(work.glob("*/*.partial"))


def test_the_ledger_has_every_form_and_its_gates_hold(done: Path) -> None:
    work = done.parent / "work"
    (path,) = (work / "evaluate").glob("*/ledger.json")
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["teacher", "student before", "student after", "merged", "GGUF 16-bit", "GGUF Q4_K_M"]
    assert rows["teacher"]["kl_to_teacher"] == 0.0
    assert rows["student after"]["kl_to_teacher"] < rows["student before"]["kl_to_teacher"]
    assert rows["merged"]["kl_to_previous"] <= 1e-5
    assert rows["GGUF 16-bit"]["kl_to_previous"] <= 1e-3
    assert rows["GGUF Q4_K_M"]["bytes"] < rows["GGUF 16-bit"]["bytes"]
    assert all(len(row["kl_to_teacher_by_row"]) == 4 for row in rows.values())


def test_a_second_run_reuses_everything_and_changes_nothing(done: Path) -> None:
    before = digests(done.parent / "work")
    again = toolchain(done, "run", "--until", "evaluate")
    assert again.returncode == 0
    assert again.stderr.count("reused") == len(UP_TO_GGUF)
    assert digests(done.parent / "work") == before


def test_a_changed_setting_runs_only_what_it_reaches_and_plan_says_why(done: Path) -> None:
    planned = toolchain(done, "plan", "--json", "--set", "distill.learning_rate=0.002")
    states = {row["step"].split("[")[0]: row for row in json.loads(planned.stdout)}
    assert [name for name, row in states.items() if row["state"] == "reuse"] == [
        "teacher",
        "student",
        "vocabulary",
        "generate",
        "select",
        "capture",
    ]
    assert "distill.learning_rate: 0.001 → 0.002" in states["distill"]["why"]
    assert states["merge"]["state"] == "wait"


def test_other_layers_do_not_capture_the_teacher_again(copy: Path) -> None:
    ran = toolchain(copy, "run", "--until", "capture", "--set", "student.keep_layers=[0, 1]")
    assert ran.returncode == 0, ran.stderr
    assert "▸ student: run (student.keep_layers: [0, 2] → [0, 1])" in ran.stderr
    assert "= generate: reused" in ran.stderr
    assert "= capture: reused" in ran.stderr


def test_a_changed_gate_measures_nothing_anew_and_stops_the_bundle(done: Path) -> None:
    stopped = toolchain(done, "bundle", "--set", "evaluate.max_kl_ratio=0.0001")
    assert stopped.returncode == 3
    assert "no bundle is built: KL to the teacher after ÷ before distillation" in stopped.stderr
    assert not (done.parent / "work" / "bundle-x86-cpu").exists()


def test_a_tampered_artifact_is_named_and_not_used(copy: Path) -> None:
    (model,) = (copy.parent / "work" / "quantize").glob("*/model.gguf")
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    found = toolchain(copy, "run", "--until", "evaluate", "--verify")
    assert found.returncode == 1
    assert "model.gguf: its bytes have changed since it was made" in found.stderr
    # A bundle build hashes what it ships without being asked.
    assert "its bytes have changed" in toolchain(copy, "bundle").stderr


def test_the_rest_of_the_way_ends_with_a_report_on_screen_and_in_files(copy: Path) -> None:
    ran = toolchain(copy, "run")
    assert ran.returncode == 0, ran.stderr
    reports = copy.parent / "work" / "reports" / "tiny"
    found = json.loads((reports / "report.json").read_text())
    assert found["targets"]["x86-cpu"]["smoke"]["ok"]
    assert len(found["targets"]["x86-cpu"]["bench"]["metrics"]["pp64_tps"]["samples"]) == 2
    assert [name.split("[")[0] for name in found["stages"]] == list(IN_THIS_RECIPE)
    assert (reports / "report.md").read_text().strip() == ran.stdout.strip()
    assert json.loads(toolchain(copy, "report", "--json").stdout) == found
    more = toolchain(copy, "run", *FORMS, f'bundle.base.x86_64="{saved(copy.parent / "base.tar")}"')
    assert more.returncode == 0, more.stderr
    assert more.stderr.count(": reused") == len(IN_THIS_RECIPE)
    (bundle,) = (copy.parent / "work" / "bundle-x86-cpu").glob("*/tiny-*")
    by_hand = {"archive": copy.parent / "by_hand.tar", "image": copy.parent / "by_hand.image.tar"}
    archive.pack(bundle, by_hand["archive"], report=Silent())
    image.pack(bundle, by_hand["image"], base=copy.parent / "base.tar", report=Silent())
    facts = manifest_of(copy.parent / "work", "forms-x86-cpu").metrics
    for form, path in by_hand.items():
        (made,) = (copy.parent / "work" / "forms-x86-cpu").glob(f"*/{facts[form]['file']}")
        assert made.read_bytes() == path.read_bytes()


def test_the_same_recipe_elsewhere_gives_the_same_bytes(done: Path, tmp_path: Path) -> None:
    """Where files lie, when it ran and by which process: none of it is in an artifact."""
    other = make_recipe(tmp_path / "other place")
    assert toolchain(other, "run", "--until", "quantize").returncode == 0
    theirs = digests(done.parent / "work")
    assert digests(other.parent / "work") == {name: theirs[name] for name in UP_TO_GGUF if name != "evaluate"}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("interrupted"))


@pytest.mark.parametrize("stage", UP_TO_GGUF)
def test_ctrl_c_and_kill_9_in_a_stage_break_nothing(interrupted: Path, stage: str) -> None:
    """In the order of the way, so that each parameter starts where the one before ended."""
    with started(interrupted, stage) as run:
        os.kill(run.pid, signal.SIGINT)
        assert run.wait(20) == 130
        assert "interrupted: what is done is kept" in run.stderr.read()  # type: ignore[union-attr]
    with started(interrupted, stage) as run:
        run.kill()
        run.wait(20)
    assert not list((interrupted.parent / "work" / stage).glob("*/manifest.json")), "it was over before the kill"
    assert toolchain(interrupted, "run", "--until", stage).returncode == 0


def test_after_all_those_kills_every_byte_is_as_in_a_quiet_run(interrupted: Path, done: Path) -> None:
    assert digests(interrupted.parent / "work") == digests(done.parent / "work")


class started:  # noqa: N801 - reads as a phrase
    """`toolchain run --until STAGE`, held at the moment when the worker of STAGE has begun."""

    def __init__(self, recipe: Path, stage: str) -> None:
        self._argv = command(recipe, "run", "--until", stage)
        self._stage = stage

    def __enter__(self) -> "subprocess.Popen[str]":
        self._run = subprocess.Popen(self._argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._run.stderr is not None
        for line in self._run.stderr:
            if line.startswith(f"▸ {self._stage}"):
                break
        else:
            raise AssertionError(f"{self._stage} never began")
        _wait_for(lambda: bool(_children(self._run.pid)))
        time.sleep(0.3 if self._stage == "quantize" else 1.0)  # tiny models quantize in no time
        return self._run

    def __exit__(self, *exception: object) -> None:
        self._run.kill()
        self._run.wait()
        assert self._run.stderr is not None
        self._run.stderr.close()


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_at_once_is_told_who_is_at_work(done: Path) -> None:
    with lock(done.parent / "work", what="run elsewhere"):
        refused = toolchain(done, "run")
    assert refused.returncode == 1
    assert f"is in use by process {os.getpid()}" in refused.stderr
    assert "--work" in refused.stderr
