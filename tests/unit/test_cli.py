"""The command line as a user meets it: help, errors, exit codes."""

import errno
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain import cli
from toolchain.errors import HostError
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.pipeline import STAGE_NAMES, steps
from toolchain.recipe import read_recipe
from toolchain.target import read_target

HEAVY = ("torch", "transformers", "pydantic", "numpy", "rich", "gguf")


def toolchain(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolchain.cli", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("")
    path = tmp_path / "recipe.toml"
    path.write_text(
        'name = "tiny"\n[teacher]\nmodel = "teacher"\n[data]\ntrain = "train.jsonl"\nheld_out = "held_out.jsonl"\n'
    )
    return path


def test_the_verbs_are_the_stages_in_their_order() -> None:
    assert tuple(cli.VERBS) == STAGE_NAMES


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    done = toolchain("--help")
    assert done.returncode == 0
    for verb in (
        *STAGE_NAMES,
        "run",
        "plan",
        "report",
        "init",
        "schema",
        "doctor",
        "llama-cpp",
        "runtime",
        "pack",
        "sign",
        "verify",
    ):
        assert f"\n  {verb} " in done.stdout
    probe = "import sys, toolchain.cli; print([name for name in sys.argv[1:] if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe, *HEAVY], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_what_runs_on_a_device_is_left_out_for_one_that_this_host_is_not_like(recipe: Path) -> None:
    elsewhere = "rpi5" if platform.machine() == "x86_64" else "x86-cpu"
    read = read_recipe(recipe, {})
    names = [step.name for step in steps(read, ("x86-cpu", "rpi5"))]
    assert {"bundle[x86-cpu]", "bundle[rpi5]"} <= set(names)
    assert f"smoke[{elsewhere}]" not in names
    assert f"bench[{elsewhere}]" not in names
    assert len([name for name in names if name.startswith("smoke")]) == 1


def test_a_users_mistake_is_an_error_and_a_hint_without_a_traceback(tmp_path: Path, recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "[distill]\ntemprature = 3.0\n")
    done = toolchain("plan", str(recipe))
    assert done.returncode == 2
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first == f"error: {recipe}: distill: unknown key 'temprature'"
    assert second.startswith("hint: did you mean 'temperature'?")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan"], 2, "Missing argument 'RECIPE'"),
        (["plan", "none.toml"], 2, "none.toml: no such file"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["plan", "recipe.toml", "--set", "distill.epochs"], 2, "not of the form KEY=VALUE"),
        (["plan", "recipe.toml", "--set", "distill.epochs=0"], 2, "distill.epochs"),
        (["plan", "recipe.toml", "--target", "vax"], 2, "no target 'vax'"),
        (["run", "recipe.toml", "--until", "nowhere"], 2, "nowhere"),
        (["report", "recipe.toml"], 1, "nothing to report: evaluate is not done"),
        (["init", "recipe.toml"], 2, "is there already"),
        (["on_policy", "recipe.toml"], 2, "tiny: nothing to do for stage on_policy"),
        (["run", "recipe.toml", "--until", "on_policy"], 2, "tiny: nothing to do for stage on_policy"),
    ],
)
def test_wrong_calls_say_what_is_wrong(recipe: Path, arguments: list[str], code: int, says: str) -> None:
    done = toolchain(*arguments, cwd=recipe.parent)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_says_what_would_run_and_why_as_text_and_as_json(recipe: Path) -> None:
    text = toolchain("plan", str(recipe), cwd=recipe.parent)
    assert text.returncode == 0
    assert "teacher          run     never made" in text.stdout
    assert "needs teacher, which is not done" in text.stdout
    rows = json.loads(toolchain("plan", str(recipe), "--json", cwd=recipe.parent).stdout)
    # on_policy has no steps by default, and the bundle's folder is the only form.
    wanted = [name for name in STAGE_NAMES if name not in ("on_policy", "forms")]
    assert [row["step"].split("[")[0] for row in rows] == wanted
    assert rows[0]["state"] == "run"
    assert len(rows[0]["fingerprint"]) == 64


def test_init_writes_a_recipe_that_plan_reads_once_its_files_are_there(tmp_path: Path) -> None:
    assert toolchain("init", "mine.toml", cwd=tmp_path).returncode == 0
    missing = toolchain("plan", "mine.toml", cwd=tmp_path)
    assert missing.returncode == 2
    assert "teacher.model: no such file or folder" in missing.stderr
    for name in ("models/teacher", "data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / "data" / name).write_text("")
    assert toolchain("plan", "mine.toml", cwd=tmp_path).returncode == 0


def test_no_room_for_a_temporary_folder_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("elftools")

    def none(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.TemporaryDirectory", none)
    with pytest.raises(HostError, match="no temporary folder can be made: No usable temporary") as caught:
        cli._checked(LlamaCpp(tmp_path, "", "", ()), read_target("x86-cpu"))
    assert "TMPDIR" in str(caught.value.hint)


def test_schema_prints_json_schema() -> None:
    for kind in ("recipe", "target"):
        assert json.loads(toolchain("schema", "--of", kind).stdout)["type"] == "object"


def test_a_verb_whose_inputs_are_missing_says_what_to_run_first(recipe: Path) -> None:
    done = toolchain("merge", str(recipe), cwd=recipe.parent)
    assert done.returncode == 1
    assert "merge cannot run yet: needs student, which is not done" in done.stderr
    assert "toolchain run" in done.stderr


def test_output_into_a_closed_pipe_is_quiet(recipe: Path) -> None:
    command = f"{sys.executable} -m toolchain.cli schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
