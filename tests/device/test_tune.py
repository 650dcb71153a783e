"""Settings found on this machine, by the real server: kept when faster and the same, used by serve, and no others."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles
from tests.device.test_bundle_served import _ENVIRONMENT, _PYTHON, edgectl, serving
from toolchain.device import files, probe, releases, serve, tune, tuned
from toolchain.device.client import Client
from toolchain.device.errors import BusyError
from toolchain.device.tune import Candidate
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
_ONE_THREAD = Candidate(threads=1)
_OTHER_EOS = ("--override-kv", "tokenizer.ggml.eos_token_id=int:258")
"""With it the model's answers do not end."""


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose presets ask for more threads than there are processors: each waits for one that does not run."""
    llama = bundles.x86_llama()
    folder = bundles.around(llama, read_target("x86-cpu"), tmp_path_factory.mktemp("slow"))
    presets = json.loads((folder / "presets.json").read_text())
    presets["server"]["threads"] = (os.cpu_count() or 1) + 1
    (folder / "presets.json").write_text(json.dumps(presets))
    return folder


def _run(folder: Path, home: Path, *candidates: Candidate, said: list[str] | None = None, **options: Any) -> Any:
    # More than it ever takes: where others keep the processors busy, threads that wait for each other take minutes.
    asked = tune.Options(**{"minutes": 60, "under_load": True, **options})
    say = (said if said is not None else []).append
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(tune, "_MOST_PAIRS", 5)
        return tune.run(files.open_bundle(folder), home, asked, say, candidates=candidates)


@pytest.fixture(scope="module")
def accepted(slow: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A home, and the record of a tuning that found one thread to be faster."""
    home = tmp_path_factory.mktemp("home")
    broken = Candidate(arguments=("--ubatch-size", "none"))
    record = _run(slow, home, _ONE_THREAD, broken)
    assert record["presets_stay_because"] is None
    return home, record


def _server_argv(pid: int) -> list[str]:
    """Command line of the llama-server that `edgectl serve` has started."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")


def _threads(argv: list[str]) -> str:
    return argv[argv.index("--threads") + 1]


def test_what_is_faster_and_answers_the_same_is_accepted_with_its_conditions(
    slow: Path, accepted: tuple[Path, dict[str, Any]]
) -> None:
    home, record = accepted
    bundle = files.open_bundle(slow)
    device = tuned.fingerprint(probe.probe())
    assert json.loads(tuned.record_path(home, bundle.id, device).read_text()) == json.loads(json.dumps(record))
    settings = record["tuned"]
    assert (settings["threads"], settings["arguments"]) == (1, [])
    assert (settings["bundle"], settings["device"]) == (bundle.id, device)
    low, high = settings["interval"]
    assert 1 < low <= settings["gain"] <= high
    assert len(record["pairs"]) >= 5
    assert all(len(pair[side]["score_s"]) >= 1 for pair in record["pairs"] for side in ("presets", "tuned"))
    (one, broken) = record["candidates"]
    assert (one["dropped"], one["same"]) == (None, 2)
    assert "llama-server ended with exit code 1" in broken["dropped"]
    assert record["conclusive"] is True
    assert [path.name for path in home.iterdir()] == ["tuned"]
    assert "from the next start on: --threads 1: " in tune.table(record)


def test_serve_uses_what_was_accepted_and_leaves_it_out_when_told(
    slow: Path, accepted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, _ = accepted
    with serving(slow, "--home", str(home)) as (child, _port):
        assert _threads(_server_argv(child.pid)) == "1"
    with serving(slow, "--home", str(home), "--no-tuned") as (child, _port):
        assert _threads(_server_argv(child.pid)) == str((os.cpu_count() or 1) + 1)
    with serving(slow, "--home", str(tmp_path)) as (child, _port):
        assert _threads(_server_argv(child.pid)) == str((os.cpu_count() or 1) + 1)


def test_serve_goes_back_to_the_presets_when_the_tuned_settings_do_not_start(
    slow: Path, accepted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, record = accepted
    changed = {**record, "tuned": {**record["tuned"], "arguments": ["--ubatch-size", "none"]}}
    path = tuned.record_path(tmp_path, record["bundle"], record["device"])
    path.parent.mkdir()
    path.write_text(json.dumps(changed))
    with serving(slow, "--home", str(tmp_path)) as (child, _port):
        assert "none" not in _server_argv(child.pid)


def test_a_second_tuning_returns_at_once(slow: Path, accepted: tuple[Path, dict[str, Any]]) -> None:
    home, record = accepted
    result = edgectl(slow, "tune", "--home", str(home), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(json.dumps(record))
    assert result.stderr.startswith("tuned already, ")
    assert "measuring" not in result.stderr


def test_a_faster_candidate_that_changes_the_answers_is_not_accepted(slow: Path, tmp_path: Path) -> None:
    record = _run(slow, tmp_path, Candidate(threads=1, arguments=_OTHER_EOS))
    (other,) = record["candidates"]
    assert (record["tuned"], other["same"], record["same_with_other_threads"]) == (None, 0, 2)
    assert other["dropped"].startswith("changes answers: 0 of 2 golden prompts")
    assert tuned.find(tmp_path, files.open_bundle(slow), pytest.fail) is None


def test_a_search_without_candidates_injected_ends_in_time_and_leaves_a_whole_record(
    slow: Path, tmp_path: Path
) -> None:
    start_s = time.monotonic()
    result = edgectl(slow, "tune", "--minutes", "0.5", "--home", str(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start_s < 0.5 * 60 + 20
    record = json.loads(result.stdout)
    assert record["seconds"] <= 0.5 * 60
    assert (record["tuned"] is None) is (record["presets_stay_because"] is not None)
    tried = len(record["candidates"]) + len(record["not_tried"])
    assert tried >= 8
    bundle = files.open_bundle(slow)
    assert tuned.read(tmp_path, bundle, record["device"]) == record
    assert {path.name for path in tmp_path.rglob("*")} == {
        "tuned",
        tuned.record_path(tmp_path, bundle.id, record["device"]).name,
    }


def test_without_time_for_anything_the_presets_stay_and_it_is_not_tuned_already(slow: Path, tmp_path: Path) -> None:
    record = _run(slow, tmp_path, _ONE_THREAD, minutes=0.04)
    assert record["tuned"] is None
    assert (record["complete"], record["conclusive"]) == (False, False)
    assert record["presets_stay_because"] == "there was no time: --minutes"
    said: list[str] = []
    _run(slow, tmp_path, _ONE_THREAD, said=said, minutes=0.04)
    assert said[0] == "measuring the presets"


def test_an_inconclusive_search_does_not_replace_what_was_found(
    slow: Path, accepted: tuple[Path, dict[str, Any]]
) -> None:
    home, record = accepted
    again = _run(slow, home, _ONE_THREAD, minutes=0.04, again=True)
    assert again["conclusive"] is False
    assert tuned.read(home, files.open_bundle(slow), record["device"]) == json.loads(json.dumps(record))


def test_two_do_not_tune_at_once(slow: Path, tmp_path: Path) -> None:
    with tune._alone(tmp_path / tuned.FOLDER), pytest.raises(BusyError, match="another process is tuning"):
        _run(slow, tmp_path, _ONE_THREAD)


def test_ctrl_c_stops_the_server_and_leaves_no_record(slow: Path, tmp_path: Path) -> None:
    argv = [_PYTHON, "-I", "-S", str(slow / "edgectl"), "tune", "--home", str(tmp_path)]
    with subprocess.Popen(argv, cwd="/", env=_ENVIRONMENT, stderr=subprocess.PIPE, text=True) as child:
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        end_s = time.monotonic() + 60
        # Programs that tell of the machine are children too, if they are there.
        while not (servers := [pid for pid in children.read_text().split() if _is_server(pid)]):
            assert time.monotonic() < end_s
            time.sleep(0.02)
        (server,) = servers
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    # One that had just been spawned is ended by the kernel, as its parent's death is noticed.
    end_s = time.monotonic() + 10
    while _runs(server):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    assert list((tmp_path / tuned.FOLDER).iterdir()) == []


def _is_server(pid: str) -> bool:
    try:
        return "llama-server" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def _runs(pid: str) -> bool:
    """Whether the process is there, and not only waiting to be counted as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_record_leaves_with_its_release(accepted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    source, record = accepted
    shutil.copytree(source / tuned.FOLDER, tmp_path / tuned.FOLDER)
    path = tuned.record_path(tmp_path, record["bundle"], record["device"])
    other = path.with_name("0" * 12 + "-" + path.name[13:])
    shutil.copyfile(path, other)
    home = releases.Home(tmp_path)
    release = f"tiny-1.0-x86-cpu-{path.name[:12]}"
    home.folder(release).mkdir(parents=True)
    home.remove(release)
    assert list((tmp_path / tuned.FOLDER).iterdir()) == [other]


def test_of_an_option_given_twice_the_server_takes_the_later_one(slow: Path) -> None:
    bundle, port = files.open_bundle(slow), serve.free_port()
    extra = ("--ctx-size", "256", "--ctx-size", "512")
    with serve.start(bundle, host="127.0.0.1", port=port, thread_count=1, extra=extra) as server:
        server.wait_ready(60)
        assert Client("127.0.0.1", port).get("/props")["default_generation_settings"]["n_ctx"] == 512


def test_every_flag_that_tuning_may_give_is_in_the_help_of_the_pinned_server(slow: Path) -> None:
    argv = [str(slow / "runtime" / "bin" / "llama-server"), "--help"]
    shown = subprocess.run(argv, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    words = set((shown.stdout + shown.stderr).replace(",", " ").split())
    assert [flag for flag in tuned.FLAGS if flag not in words] == []
