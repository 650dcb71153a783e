"""The demo as a newcomer runs it, on SmolLM2 and the real questions: what the README promises, checked one by one.

One run (about a quarter of an hour on 2 cores); TOOLCHAIN_DEMO_WORK names a work folder to reuse while developing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.containers import serving
from tests.containers.engine import Engine
from toolchain.bundle import image, minimal_base
from toolchain.pipeline import steps
from toolchain.recipe import read_recipe
from toolchain.reporter import Silent

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parents[2]
FORMS = ["teacher", "student before", "student after", "merged", "GGUF 16-bit", "GGUF Q4_K_M"]
CLEAN = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


def stages() -> list[str]:
    """Those of the demo, in order."""
    return [step.stage.name for step in steps(read_recipe(ROOT / "recipes" / "demo.toml"))]


def run_demo(work: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolchain.cli", "run", "recipes/demo.toml", "--work", str(work)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("TOOLCHAIN_DEMO_WORK")
    folder = Path(given) if given else tmp_path_factory.mktemp("demo")
    ran = run_demo(folder)
    assert ran.returncode == 0, ran.stderr
    print(ran.stderr, ran.stdout, sep="\n")
    return folder


@pytest.fixture(scope="module")
def report(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / "reports" / "demo" / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["ledger"]["rows"]}


def test_every_stage_ran_and_is_in_the_report(report: dict[str, Any]) -> None:
    assert [name.split("[")[0] for name in report["stages"]] == stages()
    assert report["ledger"]["held_out_rows"] >= 60


def test_distillation_at_least_halves_the_held_out_kl_to_the_teacher(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["student after"]["kl_to_teacher"] <= 0.5 * rows["student before"]["kl_to_teacher"]
    assert rows["student after"]["top1_agreement"] > rows["student before"]["top1_agreement"]
    assert rows["student after"]["perplexity"] < rows["student before"]["perplexity"]


def test_each_step_to_the_device_loses_no_more_than_it_may(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == FORMS
    assert rows["merged"]["kl_to_previous"] <= 1e-5
    assert rows["GGUF 16-bit"]["kl_to_previous"] <= 1e-3
    assert 0 < rows["GGUF Q4_K_M"]["kl_to_previous"] < 1
    assert rows["GGUF Q4_K_M"]["bytes"] < rows["GGUF 16-bit"]["bytes"] / 2
    assert rows["merged"]["parameters"] < rows["teacher"]["parameters"]


def test_the_tensors_that_fell_back_and_the_real_bits_per_weight_are_told(report: dict[str, Any]) -> None:
    quantization = report["ledger"]["quantization"]
    assert 4.5 < quantization["bits_per_weight"] < 8
    assert len(quantization["fallbacks"]) > 50  # the width of this model, 576, is not divisible by 256
    markdown = (ROOT / report["targets"]["x86-cpu"]["bundle"]).parents[1] / "reports" / "demo" / "report.md"
    assert "not divisible by 256" in markdown.read_text()


def test_the_bundle_passed_its_smoke_test_and_was_measured(report: dict[str, Any]) -> None:
    target = report["targets"]["x86-cpu"]
    assert target["smoke"]["ok"]
    metrics = target["bench"]["metrics"]
    for name in ("pp512_tps", "tg128_tps", "ttft_s", "tpot_s", "cold_start_warm_s", "cold_start_evicted_s"):
        assert len(metrics[name]["samples"]) >= 3, name
        assert all(sample > 0 for sample in metrics[name]["samples"]), name
    assert target["bench"]["memory"]["peak_rss_bytes"] > 100e6
    assert target["bench"]["device"]["cpu"]
    assert target["bench"]["measured"] is True


def test_a_second_run_reuses_every_stage_in_seconds(work: Path, report: dict[str, Any]) -> None:
    started = time.monotonic()
    again = run_demo(work)
    assert again.returncode == 0
    assert again.stderr.count(": reused") == len(stages())
    assert "▸" not in again.stderr
    # No bound on speed, only that nothing was trained or measured again: the first run takes many minutes.
    assert time.monotonic() - started < 120


@pytest.fixture(scope="module")
def moved(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (bundle,) = (work / "bundle-x86-cpu").glob("*/demo-*")
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("elsewhere") / "any name"))


@pytest.fixture(scope="module")
def client(moved: Path) -> Iterator[openai.OpenAI]:
    """The openai client on `./edgectl serve` of the moved bundle, with the system's Python and an empty environment."""
    python = getattr(sys, "_base_executable", sys.executable)
    port = "18345"
    server = subprocess.Popen(
        [python, "-I", "-S", "edgectl", "serve", "--port", port],
        cwd=moved,
        env=CLEAN,
        stderr=subprocess.PIPE,
        text=True,
    )
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as found:
        deadline = time.monotonic() + 60
        while True:
            try:
                found.models.list()
                break
            except openai.APIError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield found
    server.terminate()
    server.wait(20)
    assert server.stderr is not None
    server.stderr.close()


QUESTION: list[Any] = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "How do I list the Helm releases of a namespace?"},
]


def ask(client: openai.OpenAI, *, stream: bool) -> tuple[str, str]:
    """(text, finish reason) of a held-out question, greedy."""
    if not stream:
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=48)
        return answer.choices[0].message.content or "", answer.choices[0].finish_reason
    text, finish = "", ""
    with client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=48, stream=True
    ) as parts:
        for part in parts:
            for choice in part.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
    return text, finish


def test_the_openai_client_gets_the_same_answer_streamed_and_whole(client: openai.OpenAI) -> None:
    whole, streamed = ask(client, stream=False), ask(client, stream=True)
    assert whole == streamed
    assert len(whole[0]) > 10
    assert whole[1] in ("stop", "length")


@pytest.mark.docker
def test_its_image_runs_confined_and_gives_the_same_answer(
    docker: Engine, work: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    (bundle,) = (work / "bundle-x86-cpu").glob("*/demo-*")
    minimal_base.make(tmp_path / "base.tar", arch="x86_64", report=Silent())
    made = image.pack(bundle, tmp_path / "image.tar", base=tmp_path / "base.tar", report=Silent())
    loaded = docker.run("load", "--input", str(tmp_path / "image.tar"))
    assert loaded.returncode == 0, loaded.stderr
    with serving.running(docker, made["reference"], tmp_path) as name:
        serving.expect_confined(docker, name)
        body = {"messages": QUESTION, "temperature": 0, "max_tokens": 48}
        (choice,) = serving.ask(docker, name, "/v1/chat/completions", body)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ask(client, stream=False)
        serving.expect_stop(docker, name)


def test_the_moved_bundle_verifies_and_a_changed_byte_is_found(moved: Path) -> None:
    python = getattr(sys, "_base_executable", sys.executable)

    def verify() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-I", "-S", "edgectl", "verify"], cwd=moved, env=CLEAN, capture_output=True, text=True, check=False
        )

    assert verify().returncode == 0
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=moved, check=False).returncode == 0
    (model,) = (moved / "model").glob("*.gguf")
    with model.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    spoilt = verify()
    assert spoilt.returncode == 1
    assert model.name in spoilt.stdout
