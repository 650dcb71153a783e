"""A bundle copied away from where it was built, run as on a device: the system's Python, no packages."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles, records, tiny_chat
from toolchain.bundle import build
from toolchain.device import files, greedy, measure, serve, tuned
from toolchain.device.client import Client
from toolchain.device.errors import BusyError, DeviceError
from toolchain.gguf import llama_cpp
from toolchain.reporter import Silent
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
_PYTHON = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
_ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
_PROMPT = [{"role": "user", "content": "How are you?"}]


@pytest.fixture(scope="session")
def llama() -> llama_cpp.LlamaCpp:
    return bundles.x86_llama()


Builder = Callable[..., Path]


@pytest.fixture(scope="session")
def make(llama: llama_cpp.LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Build a bundle and give a copy of it in another place."""

    def build_and_copy(
        eos: str = "<|fin|>",
        golden: list[dict[str, Any]] | None = None,
        answer: str = tiny_chat.ANSWER,
        answering: llama_cpp.LlamaCpp | None = llama,
    ) -> Path:
        work = tmp_path_factory.mktemp("work")
        out = work / "out"
        out.mkdir()
        facts = build.run(
            build.BundleSettings(name="tiny", version="1.0", context=tiny_chat.CONTEXT),
            target=read_target("x86-cpu"),
            gguf=tiny_chat.write_gguf(work / "model.gguf", eos=eos, answer=answer),
            quantize_facts={},
            ledger=bundles.LEDGER,
            golden=tiny_chat.golden() if golden is None else golden,
            lineage={"quantize": "sha256:" + "0" * 64},
            llama=llama,
            answering=answering,
            out=out,
            report=Silent(),
        )
        copy = tmp_path_factory.mktemp("device") / "a place with spaces"
        shutil.copytree(out / facts["folder"], copy)
        shutil.rmtree(work)
        return copy

    return build_and_copy


@pytest.fixture(scope="session")
def bundle(make: Builder) -> Path:
    return make()


def edgectl(bundle: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = [_PYTHON, "-I", "-S", str(bundle / "edgectl"), *arguments]
    return subprocess.run(argv, cwd="/", env=_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=180)


def checks(result: "subprocess.CompletedProcess[str]") -> dict[str, tuple[bool, str]]:
    return {item["name"]: (item["ok"], item["detail"]) for item in json.loads(result.stdout)["checks"]}


@contextmanager
def serving(bundle: Path, *arguments: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """`edgectl serve` and its port, once it answers."""
    port = serve.free_port()
    argv = [_PYTHON, "-I", "-S", str(bundle / "edgectl"), "serve", "--port", str(port), *arguments]
    with subprocess.Popen(argv, cwd="/", env=_ENVIRONMENT, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stderr is not None
            for line in child.stderr:
                if line.startswith("ready after"):
                    break
            else:
                pytest.fail(f"not ready, exit code {child.wait()}")
            yield child, port
        finally:
            child.kill()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def gone_within(port: int, limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while answers(port):
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


def test_a_copied_bundle_passes_every_smoke_check(bundle: Path) -> None:
    result = edgectl(bundle, "smoke", "--json")
    found = checks(result)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(found) == 19
    assert all(ok for ok, _ in found.values())
    assert found["server ready"][1].startswith(("refused → 503 → 200", "503 → 200", "refused → 200"))
    assert "libggml-cpu-" in found["backend"][1]
    assert found["stops at eos"][1].startswith("2 of 2")
    assert found["greedy answers"][1].startswith("10 of 10 recorded tokens that were no near-ties")
    assert "2 of 2 answers whole; recorded by libggml-cpu-" in found["greedy answers"][1]


def test_running_a_bundle_leaves_no_file_behind(bundle: Path) -> None:
    edgectl(bundle, "info")
    assert edgectl(bundle, "verify").returncode == 0
    assert not list(bundle.rglob("__pycache__"))


def test_health_is_503_while_a_model_is_loaded(bundle: Path) -> None:
    opened = files.open_bundle(bundle)
    # Half a gigabyte of keys and values is cleared before it is ready.
    with serve.start(opened, host="127.0.0.1", port=serve.free_port(), extra=("--ctx-size", "400000")) as server:
        server.wait_ready(serve.ready_timeout_s(opened))
        assert server.health in (["refused", "503", "200"], ["503", "200"])
        assert server.listening_s < server.ready_s


def test_smoke_fails_when_the_server_renders_other_prompt_ids(make: Builder) -> None:
    wrong = tiny_chat.golden()
    wrong[1]["prompt_ids"][-1] = 7
    found = checks(edgectl(make(golden=wrong), "smoke", "--json"))
    last = len(wrong[1]["prompt_ids"]) - 1
    assert found["golden prompt ids"][0] is False
    assert f"prompt 1: {last + 1} ids, expected {last + 1}; differs at {last}" in found["golden prompt ids"][1]
    assert found["chat feeds those ids"][0] is True
    assert found["stops at eos"][0] is True


def test_smoke_fails_when_answers_do_not_end(make: Builder) -> None:
    result = edgectl(make(eos="<|other|>"), "smoke", "--json")
    assert result.returncode == 1
    failed = {name for name, (ok, _) in checks(result).items() if not ok}
    assert failed == {"stops at eos"}


def test_smoke_fails_when_the_answers_were_recorded_from_another_model(make: Builder, bundle: Path) -> None:
    other = make(answer="Yes!")
    shutil.copy(bundle / "eval" / "answers.json", other / "eval" / "answers.json")
    bundles.reseal(other)
    result = edgectl(other, "smoke", "--json")
    assert result.returncode == 1
    found = checks(result)
    assert {name for name, (ok, _) in found.items() if not ok} == {"greedy answers"}
    assert found["greedy answers"][1].startswith(
        "0 of 1 recorded tokens that were no near-ties, 97% needed of 10: broken off"
    )


def test_smoke_of_a_bundle_without_recorded_answers_says_so(make: Builder) -> None:
    result = edgectl(make(answering=None), "smoke", "--json")
    assert result.returncode == 0, result.stdout
    assert checks(result)["greedy answers"][1].startswith("nothing to compare with")


def test_a_host_records_the_same_answers_each_time(make: Builder, bundle: Path) -> None:
    assert bundles.every_byte(make()) == bundles.every_byte(bundle)


def test_a_near_tie_may_flip_and_another_token_may_not(bundle: Path) -> None:
    golden, recorded = files.open_bundle(bundle).golden(), files.open_bundle(bundle).answers()
    assert recorded is not None
    ids, margins = [*map(ord, tiny_chat.ANSWER), tiny_chat.token_id("<|fin|>")], recorded["answers"][0]["margins"]
    assert recorded["answers"] == [{"ids": ids, "margins": margins}] * 2
    assert min(margins) > 10
    prompts = [prompt["prompt_ids"] for prompt in golden]
    with serving(bundle) as (_, port):
        client = Client("127.0.0.1", port)
        for margin, expected, shown in ((0.4, True, "9 of 9"), (0.6, False, "9 of 10")):
            flipped = {"ids": [*ids[:-1], ord("z")], "margins": [*margins[:-1], margin]}
            changed = {**recorded, "answers": [recorded["answers"][0], flipped]}
            ok, detail = greedy.compare(client, prompts, changed, [ids, ids])
            assert (ok, detail.split(" recorded tokens")[0]) == (expected, shown)
            assert "1 of 2 answers whole" in detail
        # What the server's own answers do not tell is asked for.
        ok, detail = greedy.compare(client, prompts, recorded, [[], ids[:1]])
        assert (ok, detail.split(" recorded tokens")[0]) == (True, "10 of 10")
        assert "0 of 2 answers whole" in detail


def test_smoke_names_a_changed_file_and_still_runs_the_other_checks(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "MODEL_CARD.md").open("a") as file:
        file.write("more")
    found = checks(edgectl(copy, "smoke", "--json"))
    assert found["files"][0] is False
    assert "MODEL_CARD.md: changed" in found["files"][1]
    assert all(ok for name, (ok, _) in found.items() if name != "files")


def test_smoke_says_why_the_server_did_not_start(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    model = next((copy / "model").iterdir())
    os.truncate(model, model.stat().st_size // 2)
    result = edgectl(copy, "smoke", "--json")
    found = checks(result)
    assert result.returncode == 1
    assert "failed to load model" in found["server ready"][1]
    assert "Traceback" not in result.stderr


def test_the_openai_client_gets_the_same_answer_streamed_and_whole(bundle: Path) -> None:
    openai = pytest.importorskip("openai")
    with serving(bundle) as (_, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        whole = client.chat.completions.create(model="tiny", messages=_PROMPT, temperature=0, max_tokens=50)
        assert whole.choices[0].message.content == tiny_chat.ANSWER
        assert whole.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(
            model="tiny", messages=_PROMPT, temperature=0, max_tokens=50, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == tiny_chat.ANSWER
        assert sum(bool(piece) for piece in pieces) == len(tiny_chat.ANSWER)
        assert [model.id for model in client.models.list()] == ["tiny"]
        client.close()


def test_the_key_file_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("open sesame\n")
    with serving(bundle, "--api-key-file", str(key_file)) as (_, port):
        url = f"http://127.0.0.1:{port}/v1/models"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url)
        assert refused.value.code == 401
        refused.value.close()
        request = urllib.request.Request(url, headers={"Authorization": "Bearer open sesame"})
        with urllib.request.urlopen(request) as response:
            assert response.status == 200


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_stops_the_server_and_frees_the_port(bundle: Path, number: signal.Signals, code: int) -> None:
    with serving(bundle) as (child, port):
        child.send_signal(number)
        _, errors = child.communicate(timeout=20)
        assert child.returncode == code
        assert "Traceback" not in errors
        assert not answers(port)


def test_killing_edgectl_leaves_no_server(bundle: Path) -> None:
    with serving(bundle) as (child, port):
        assert answers(port)
        child.kill()
        child.wait()
        assert gone_within(port, 10)


def _server_of(edgectl: "subprocess.Popen[str]") -> int:
    (pid,) = Path(f"/proc/{edgectl.pid}/task/{edgectl.pid}/children").read_text().split()
    return int(pid)


def _kill_server(edgectl: "subprocess.Popen[str]") -> None:
    os.kill(_server_of(edgectl), signal.SIGKILL)


def _said_until_ready(edgectl: "subprocess.Popen[str]") -> list[str]:
    """Its lines up to the next "ready", or to its end."""
    assert edgectl.stderr is not None
    said = []
    for line in edgectl.stderr:
        said.append(line)
        if line.startswith("ready after"):
            break
    return said


def test_a_server_that_dies_is_started_again_with_a_line_that_says_why(bundle: Path) -> None:
    with serving(bundle) as (child, port):
        first = _server_of(child)
        _kill_server(child)
        said = _said_until_ready(child)
        (why,) = (line for line in said if "started again" in line)
        assert why.startswith("llama-server was ended by SIGKILL (often: out of memory)")
        assert why.endswith("started again in 0.5 s\n")
        assert _server_of(child) != first
        assert answers(port)


_ENDS = """#!/bin/sh
echo "started $*" >> '{starts}'
case $(wc -l < '{starts}') in
{ends}
esac
exec "$0-itself" "$@"
"""
_ENDS_AFTER_HEALTH = """exec python3 -c '
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/health":
            os._exit(3)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
address = ("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
' "$@" """


def _with_starts_that_fail(bundle: Path, tmp_path: Path, ends: str) -> Path:
    """A copy whose llama-server ends as `ends`, cases of sh by the number of the start, says."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / files.MANIFEST).read_text())
    name = "runtime/bin/llama-server"
    (copy / name).rename(copy / f"{name}-itself")
    manifest["files"][f"{name}-itself"] = dict(manifest["files"][name])
    (copy / name).write_text(_ENDS.format(starts=tmp_path / "starts", ends=ends))
    (copy / name).chmod(0o755)
    bundles.reseal(copy, manifest)
    return copy


def test_a_server_that_dies_while_it_loads_again_is_started_again(bundle: Path, tmp_path: Path) -> None:
    copy = _with_starts_that_fail(bundle, tmp_path, f"2) kill -9 $$ ;;\n3) {_ENDS_AFTER_HEALTH} ;;")
    with serving(copy) as (child, port):
        _kill_server(child)
        said = _said_until_ready(child)
        again = [line for line in said if "started again in" in line]
        assert [line.rpartition(" in ")[2] for line in again] == ["0.5 s\n", "1 s\n", "2 s\n"], said
        assert again[1].startswith("llama-server was ended by SIGKILL")
        assert again[2].startswith("llama-server no longer answers")
        assert answers(port)


def test_programs_are_told_of_each_start_and_each_end(bundle: Path) -> None:
    port = serve.free_port()
    argv = [_PYTHON, "-I", "-S", str(bundle / "edgectl"), "serve", "--port", str(port), "--json"]
    said: list[dict[str, Any]] = []
    with subprocess.Popen(argv, cwd="/", env=_ENVIRONMENT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            said.append(json.loads(line))
            if len(said) == 3:
                child.terminate()
            elif said[-1]["event"] == "ready":
                os.kill(said[-1]["pid"], signal.SIGKILL)
    assert child.returncode == 143
    assert [event["event"] for event in said] == ["ready", "ended", "ready"]
    assert {event["bundle"] for event in said} == {files.open_bundle(bundle).id}
    assert said[0]["url"] == f"http://127.0.0.1:{port}"
    assert said[0]["seconds"] > 0
    assert said[1]["again_in_s"] == 0.5
    assert said[1]["reason"].startswith("llama-server was ended by SIGKILL")


def test_a_server_is_not_stopped_because_nobody_takes_its_events(bundle: Path) -> None:
    port = serve.free_port()
    argv = [_PYTHON, "-I", "-S", str(bundle / "edgectl"), "serve", "--port", str(port), "--json"]
    with subprocess.Popen(
        argv, cwd="/", env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        try:
            _said_until_ready(child)
            _kill_server(child)
            _said_until_ready(child)
            assert answers(port)
        finally:
            child.terminate()
            child.stderr.read()
    assert child.returncode == 143


def test_starts_that_fail_again_and_again_end_edgectl(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.Restarts, "FIRST_S", 0.001)
    copy = _with_starts_that_fail(bundle, tmp_path, "1) ;;\n*) echo no memory; exit 1 ;;")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("ready after"):
            _kill_program_of(copy)

    with pytest.raises(DeviceError, match=r"exit code 1: no memory; it ended 7 times in a row"):
        serve.run(files.open_bundle(copy), host="127.0.0.1", port=serve.free_port(), key_file=None, say=say)
    assert sum("started again in" in line for line in said) == 6
    assert (tmp_path / "starts").read_text().count("started") == 7


def test_tuned_settings_that_have_served_are_kept_when_a_later_start_fails(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.Restarts, "FIRST_S", 0.001)
    copy = _with_starts_that_fail(bundle, tmp_path, "2) kill -9 $$ ;;")
    settings = tuned.Tuned(1, ("--ubatch-size", "128"), 1.5)

    def say(line: str) -> None:
        if line.startswith("ready after"):
            if (tmp_path / "starts").read_text().count("started") == 3:
                raise KeyboardInterrupt
            _kill_program_of(copy)

    with pytest.raises(KeyboardInterrupt):
        serve.run(
            files.open_bundle(copy), host="127.0.0.1", port=serve.free_port(), key_file=None, tuned=settings, say=say
        )
    assert (tmp_path / "starts").read_text().count("--ubatch-size 128") == 3


def _kill_program_of(bundle: Path) -> None:
    (pid,) = (int(path.parent.name) for path in Path("/proc").glob("[0-9]*/exe") if _is_of(path, bundle))
    os.kill(pid, signal.SIGKILL)


def _is_of(program: Path, folder: Path) -> bool:
    try:
        return program.readlink().is_relative_to(folder)
    except OSError:  # another user's, or gone
        return False


def test_a_first_start_that_fails_ends_edgectl_with_its_reason(bundle: Path, tmp_path: Path) -> None:
    copy = _with_starts_that_fail(bundle, tmp_path, "*) echo no memory; exit 1 ;;")
    result = edgectl(copy, "serve", "--port", str(serve.free_port()))
    assert result.returncode == 1
    assert "error: llama-server ended with exit code 1: no memory\n" in result.stderr
    assert (tmp_path / "starts").read_text().count("started") == 1


def test_a_bundle_that_was_damaged_since_is_not_tried_again_and_again(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with serving(copy) as (child, _):
        model = next((copy / "model").iterdir())
        content = model.read_bytes()
        model.unlink()
        model.write_bytes(content[: len(content) // 2])
        _kill_server(child)
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 1
    assert errors.count("started again in") == 1
    assert "failed to load model" in errors.splitlines()[-1]


def test_a_port_in_use_is_one_clear_error_with_a_free_port(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = edgectl(bundle, "serve", "--port", str(port))
    assert result.returncode == BusyError.exit_code
    assert result.stderr.startswith(f"error: port {port} on 127.0.0.1 is in use\nhint: port ")
    assert result.stderr.count("\n") == 2


@pytest.fixture(scope="module")
def benched(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The record of a short benchmark, and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "record.json"
    options = ["--repetitions", "2", "--cold-starts", "2", "--prompt-tokens", "64", "--generated-tokens", "8"]
    options += ["--clients", "1,3", "--sustained", "0.5"]
    result = edgectl(bundle, "bench", *options, "--out", str(out))
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text()), result.stdout


def test_bench_writes_a_record_with_every_sample_and_its_conditions(
    bundle: Path, benched: tuple[dict[str, Any], str]
) -> None:
    record, shown = benched
    names = {"pp64_tps", "tg8_tps", "ttft_s", "tpot_s", "served_decode_tps", "served_prefill_tps"}
    names |= {f"{name}_{state}_s" for name in ("listening", "load", "cold_start") for state in ("warm", "evicted")}
    other = {"ttft_3_clients_s": 6, "tpot_3_clients_s": 6, "served_3_clients_tps": 2, "sustained_tps": 3}
    other[f"tg8_d{(tiny_chat.CONTEXT - 8) // 128 * 128}_tps"] = 2
    assert {name: len(metric["samples"]) for name, metric in record["metrics"].items()} == dict.fromkeys(
        names, 2
    ) | other
    for metric in record["metrics"].values():
        assert min(metric["samples"]) > 0
        assert min(metric["samples"]) <= metric["p50"] <= metric["p95"] <= max(metric["samples"])
    assert set(records.figures(record).values()) == {True}
    for first, ready in zip(
        record["metrics"]["cold_start_warm_s"]["samples"], record["metrics"]["load_warm_s"]["samples"], strict=True
    ):
        assert first > ready
    for ready, listening in zip(
        record["metrics"]["load_warm_s"]["samples"], record["metrics"]["listening_warm_s"]["samples"], strict=True
    ):
        assert ready >= listening
    assert record["memory"]["served_generated_tokens"] == [8, 8]
    assert all(60 <= count <= 64 for count in record["memory"]["served_prompt_tokens"])
    assert record["memory"]["peak_rss_bytes"] >= record["memory"]["pss_bytes"] > 0
    assert record["bundle"] == files.open_bundle(bundle).id
    assert record["measured"] is True
    assert record["conclusive"] is False
    assert "ttft_s: 2 samples, at least 5 are needed" in record["inconclusive_because"]
    changed = ["repetitions", "cold_starts", "prompt_tokens", "generated_tokens", "clients", "sustained_minutes"]
    assert record["other_than_regime"] == changed
    assert f"measured as the bundle says, but for {', '.join(changed)}" in shown
    assert set(record["foreign_cpu_share"]) == {
        "memory bandwidth",
        "llama-bench",
        "as served",
        "3 clients",
        "cold start, warm",
        "cold start, evicted",
        "sustained",
    }
    roof = record["roofline"]
    assert roof["pct"] == pytest.approx(100 * record["metrics"]["tg8_tps"]["p50"] / roof["ceiling_tps"])
    assert roof["ceiling_tps"] == pytest.approx(roof["read_gb_per_s"] * 1e9 / roof["bytes_per_token"])
    assert record["sustained"]["last_to_first"] > 0
    assert record["sustained"]["tokens"] > 100
    assert all(faults is not None for faults in record["page_cache"]["major_faults"]["evicted"])
    assert "pp64_tps" in shown


def calm(record: dict[str, Any]) -> dict[str, Any]:
    """As on a machine that was neither throttled nor busy."""
    sustained = {**record["sustained"], "states": []}
    changed = {"device": {}, "device_after": {}, "throttled": {}, "sustained": sustained}
    return {**record, **changed, "foreign_cpu_share": {"llama-bench": 0.01}}


Gated = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def gated(bundle: Path, tmp_path: Path) -> Gated:
    """Exit code and report of `edgectl gate` for a record; with `budgets`, for those in place of the bundle's own."""

    def gate(record: dict[str, Any], **budgets: float) -> tuple[int, dict[str, Any]]:
        path, copy = tmp_path / "record.json", tmp_path / "copy"
        path.write_text(json.dumps(record))
        if not copy.exists():
            shutil.copytree(bundle, copy)
        presets = json.loads((bundle / "presets.json").read_text())
        (copy / "presets.json").write_text(json.dumps({**presets, "budgets": budgets or presets["budgets"]}))
        done = edgectl(copy, "gate", str(path), "--json")
        return done.returncode, json.loads(done.stdout)

    return gate


def test_gate_judges_a_real_record_as_one_would_by_hand(benched: tuple[dict[str, Any], str], gated: Gated) -> None:
    record = calm(benched[0])
    code, report = gated(record)
    rows = {row["budget"]: row for row in report["budgets"]}
    assert set(rows) == {"roofline_pct", "sustained_ratio", "memory_x_model"}
    # Two samples, three windows: neither is judged. A server around a model of 2 MB takes many times as much.
    assert "decode: 2 samples, at least 5 are needed" in rows["roofline_pct"]["because"]
    assert rows["roofline_pct"]["value"] == record["roofline"]["pct"]
    assert rows["sustained_ratio"]["because"] == [
        "first and last minute, ten seconds each: 1 sample, at least 5 are needed"
    ]
    assert rows["sustained_ratio"]["value"] == record["sustained"]["last_to_first"]
    taken = record["memory"]["peak_rss_bytes"] / record["model"]["bytes"]
    assert rows["memory_x_model"]["value"] == pytest.approx(taken)
    assert taken > rows["memory_x_model"]["limit"] == read_target("x86-cpu").budgets.memory_x_model
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    expected = {"roofline_pct": "inconclusive", "sustained_ratio": "inconclusive", "memory_x_model": "failed"}
    assert (code, report["verdict"], verdicts) == (5, "failed", expected)
    assert gated(record, memory_x_model=taken + 1)[0] == 0
    assert gated(record, memory_x_model=taken + 1, decode_tps=1)[0] == 6


def test_gate_ends_with_a_code_for_each_verdict(benched: tuple[dict[str, Any], str], gated: Gated) -> None:
    whole = calm(benched[0])
    decode = whole["metrics"]["tg8_tps"]

    def with_samples(*shares: float) -> dict[str, Any]:
        steady = measure.summary([decode["p50"] * share for share in shares])
        return {**whole, "metrics": {**whole["metrics"], "tg8_tps": {**decode, **steady}}}

    steady, noisy = with_samples(0.98, 0.99, 1.0, 1.01, 1.02), with_samples(0.8, 0.9, 1.0, 1.1, 1.2)
    slower, faster = 0.9 * decode["p50"], 1.1 * decode["p50"]
    assert gated(steady, decode_tps=slower)[0] == 0
    code, report = gated(steady, decode_tps=faster)
    assert (code, report["verdict"], report["budgets"][0]["because"]) == (5, "failed", [])
    for limit in (slower, faster):
        code, report = gated(noisy, decode_tps=limit)
        assert (code, report["budgets"][0]["because"]) == (6, ["tg8_tps: samples vary by 15.8%"])
        assert gated({**steady, "foreign_cpu_share": {"llama-bench": 0.3}}, decode_tps=limit)[0] == 6
        assert gated({**steady, "throttled": {"llama-bench": ["under-voltage"]}}, decode_tps=limit)[0] == 6


def test_bench_measures_as_the_bundle_says_where_it_is_not_told_otherwise(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    presets = json.loads((copy / "presets.json").read_text())
    regime = {"prompt_tokens": 32, "generated_tokens": 4, "repetitions": 3, "cold_starts": 1, "depth": 0}
    presets["bench"]["options"] |= {**regime, "clients": [1]}
    (copy / "presets.json").write_text(json.dumps(presets))
    result = edgectl(copy, "bench", "--repetitions", "2", "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["options"] == {
        **{**regime, "repetitions": 2, "clients": [1]},
        **{"sustained_minutes": 0.0, "cool_down_s": 0.0},
    }
    assert record["other_than_regime"] == ["repetitions"]
    assert len(record["metrics"]["pp32_tps"]["samples"]) == 2


def test_bench_refuses_what_does_not_fit_the_context(bundle: Path) -> None:
    result = edgectl(bundle, "bench", "--prompt-tokens", "1000", "--generated-tokens", "100")
    assert result.returncode == 2
    assert "do not fit the context" in result.stderr


def test_every_flag_of_the_presets_is_in_the_help_of_the_pinned_programs(bundle: Path) -> None:
    presets = json.loads((bundle / "presets.json").read_text())
    commands = [presets["server"]["argv"] + presets["server"]["api_key_argv"], presets["bench"]["argv"]]
    for argv in commands:
        program = argv[0].replace("{bundle}", str(bundle))
        shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=False, env=_ENVIRONMENT)
        words = set((shown.stdout + shown.stderr).replace(",", " ").split())
        flags = [part for part in argv if part.startswith("-")]
        assert len(flags) >= 6
        assert [flag for flag in flags if flag not in words] == []
