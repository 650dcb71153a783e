"""Bad input through the command line: one error that names the thing, the cause and the next step; nothing is lost."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.device.test_bundle_image import layers_for, saved
from tests.stages.recipe_files import make_recipe, toolchain
from tests.tiny import give_byte_level_tokenizer, make_tiny_checkpoint
from toolchain.errors import HostError
from toolchain.gguf import llama_cpp
from toolchain.pipeline import host_cmake

pytestmark = pytest.mark.stages

ONE_ROW = '{"question": "What is ls?", "answer": "A command."}\n'


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher and student are made; what follows is to be spoilt."""
    recipe = make_recipe(tmp_path_factory.mktemp("good"))
    assert toolchain(recipe, "run", "--until", "student").returncode == 0
    return recipe


@pytest.fixture
def recipe(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good.parent, tmp_path / "copy")
    return tmp_path / "copy" / "recipe.toml"


def _train(content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "train.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def _cut_weights(folder: Path) -> None:
    path = folder / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _only_a_pickle(folder: Path) -> None:
    (folder / "teacher" / "model.safetensors").rename(folder / "teacher" / "pytorch_model.bin")


def _a_missing_shard(folder: Path) -> None:
    teacher = folder / "teacher"
    (teacher / "model.safetensors").rename(teacher / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_template(folder: Path, model: str = "teacher") -> None:
    for path in (folder / model).glob("chat_template*"):
        path.unlink()
    config = folder / model / "tokenizer_config.json"
    content = json.loads(config.read_text())
    content.pop("chat_template", None)
    config.write_text(json.dumps(content))


def _a_gguf_teacher_that_is_cut(folder: Path) -> None:
    (folder / "teacher.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 40)
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace('model = "teacher"', 'model = "teacher.gguf"'))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_train(""), ["train.jsonl", "no rows"]),
        (_train(ONE_ROW + '{"question": "And cp?", "answer": "  "}\n'), ["train.jsonl", "row 2", "answer"]),
        (_train(ONE_ROW + '{"question": "And cp?"}\n'), ["train.jsonl", "row 2", "answer"]),
        (_train(ONE_ROW + '{"frage": "Und cp?"}\n'), ["train.jsonl", "row 2"]),
        (_train(ONE_ROW.encode() + b'{"question": "caf\xe9?", "answer": "x"}\n'), ["train.jsonl", "UTF-8"]),
        (_train(ONE_ROW + "{not json\n"), ["train.jsonl", "2", "JSON"]),
        (_train(json.dumps({"question": "Why?", "answer": "word " * 400}) + "\n"), ["row-1", "160"]),
        (_train('{"question": "What does the command  SS do?", "answer": "x"}\n'), ["held_out", "train"]),
        (_cut_weights, ["model.safetensors", "cut off"]),
        (_only_a_pickle, ["pytorch_model.bin", "pickle"]),
        (_a_missing_shard, ["model-00002-of-00002.safetensors", "no such file"]),
        (_no_template, ["chat template"]),
        (_a_gguf_teacher_that_is_cut, ["teacher.gguf", "GGUF"]),
    ],
    ids=[
        "empty", "blank answer", "no answer", "no known column", "not UTF-8", "not JSON", "too long", "on both sides",
        "cut weights", "pickle", "missing shard", "no template", "cut GGUF",
    ],
)  # fmt: skip
def test_bad_input_is_one_error_that_names_it(recipe: Path, spoil: Callable[[Path], None], says: list[str]) -> None:
    spoil(recipe.parent)
    done = toolchain(recipe, "run", "--until", "select")
    assert done.returncode in (1, 2), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in says:
        assert word.lower() in errors[0].lower()
    assert "Traceback" not in done.stderr
    assert not list((recipe.parent / "work" / "select").glob("*/manifest.json"))


def _a_cut_tokenizer(folder: Path) -> None:
    path = folder / "student" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1000])


def _a_merge_of_unknown_tokens(folder: Path) -> None:
    path = folder / "student" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].append(["no such", "tokens"])
    path.write_text(json.dumps(content))


def _fewer_rows_than_tokens(folder: Path) -> None:
    make_tiny_checkpoint(folder / "small", vocabulary=400)
    for name in ("model.safetensors", "config.json"):
        (folder / "small" / name).replace(folder / "student" / name)


def _a_template_that_is_no_template(folder: Path) -> None:
    (folder / "student" / "chat_template.jinja").write_text("{% for message in messages %}")


def _another_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "student")
    make_tiny_checkpoint(folder / "student", vocabulary=400)


@pytest.fixture
def with_student(recipe: Path) -> Path:
    """The student is a folder of its own."""
    make_tiny_checkpoint(recipe.parent / "student")
    recipe.write_text(recipe.read_text().replace("keep_layers = [0, 2]", 'model = "student"'))
    return recipe


def _no_scores(folder: Path) -> None:
    (folder / "student" / "tokenizer.model").unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda folder: give_byte_level_tokenizer(folder / "student"),
            "llama.cpp does not know how this tokenizer splits text",
        ),
        (_no_scores, "its tokenizer differs from the checkpoint's on"),
    ],
)
def test_a_student_that_cannot_be_converted_is_told_before_it_is_trained(
    with_student: Path, spoil: Callable[[Path], object], says: str, llama: llama_cpp.LlamaCpp
) -> None:
    good = toolchain(with_student, "run", "--until", "student")
    assert good.returncode == 0, good.stderr
    manifests = (with_student.parent / "work" / "student").glob("*/manifest.json")
    manifest = max(manifests, key=lambda path: path.stat().st_mtime)
    assert json.loads(manifest.read_text())["metrics"]["texts_as_llama_cpp_reads_them"] > 12
    spoil(with_student.parent)
    done = toolchain(with_student, "run", "--until", "student")
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert says in error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: _no_template(folder, "student"), ["student", "no chat template"]),
        (_a_cut_tokenizer, ["student", "the tokenizer cannot be loaded"]),
        (_a_merge_of_unknown_tokens, ["student", "the tokenizer cannot be loaded", "out of vocabulary"]),
        (_fewer_rows_than_tokens, ["student", "400 embedding rows", "ids up to 511"]),
        (_a_template_that_is_no_template, ["student", "the chat template cannot be rendered"]),
        (_another_tokenizer, ["teacher (512 tokens)", "student (400 tokens)", "different tokenizers", "ids differ"]),
    ],
    ids=["no template", "cut tokenizer", "unknown merge", "few rows", "template", "another tokenizer"],
)
def test_a_student_that_cannot_learn_so_is_one_error_before_anything_heavy(
    with_student: Path, spoil: Callable[[Path], None], says: list[str]
) -> None:
    spoil(with_student.parent)
    done = toolchain(with_student, "run")
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in says:
        assert word in errors[0]
    assert "\nhint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (with_student.parent / "work" / "generate").exists()


def test_another_tokenizer_is_fine_where_the_answers_alone_teach(with_student: Path) -> None:
    _another_tokenizer(with_student.parent)
    done = toolchain(with_student, "run", "--until", "vocabulary", "--set", "distill.method=answers")
    assert done.returncode == 0, done.stderr
    assert "two tokenizers" in done.stderr


def test_a_layer_that_the_teacher_does_not_have_is_named_with_those_it_has(recipe: Path) -> None:
    done = toolchain(recipe, "run", "--until", "student", "--set", "student.keep_layers=[0, 7]")
    assert done.returncode == 2
    assert "no layer 7" in done.stderr
    assert "0 to 2" in done.stderr


def test_a_context_that_the_student_cannot_have_is_refused_before_any_training(recipe: Path) -> None:
    done = toolchain(recipe, "run", "--set", "bundle.context=4096")
    assert done.returncode == 2
    assert "bundle.context is 4096, the student was made for 1024 tokens" in done.stderr
    assert "generate" not in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.llama_cpp
def test_a_full_disk_in_merge_and_in_quantize_is_one_error_and_leaves_nothing_that_looks_done(
    good: Path, recipe: Path, small_disk: Path
) -> None:
    try:
        llama_cpp.find(host_cmake())
    except HostError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    work = recipe.parent / "work"
    for stage, before in (("merge", "distill"), ("quantize", "imatrix")):
        assert toolchain(recipe, "run", "--until", before).returncode == 0
        (work / stage).symlink_to(small_disk, target_is_directory=True)
        (small_disk / "filler").write_bytes(b"\0" * 900_000)
        done = toolchain(recipe, stage)
        assert done.returncode == 1, done.stderr
        assert "free" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list((work / stage).glob("*/manifest.json"))
        for path in small_disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (work / stage).unlink()
        assert toolchain(recipe, "run", "--until", stage).returncode == 0


@pytest.mark.parametrize(
    ("key", "base", "says"),
    [
        ("aarch64", {}, "bundle.base.x86_64 is missing, and the image for x86-cpu stands on it"),
        ("x86_64", {"arch": "arm64"}, "is for linux/arm64, the bundle for linux/amd64"),
        ("x86_64", {"layers": layers_for(python="3.9")}, "Python 3.9 in it, edgectl needs 3.10"),
    ],
)
def test_a_base_on_which_no_image_can_stand_is_found_before_anything_is_trained(
    recipe: Path, key: str, base: dict[str, Any], says: str
) -> None:
    path = saved(recipe.parent / "base.tar", **base)
    done = toolchain(recipe, "run", "--set", 'bundle.forms=["image"]', "--set", f'bundle.base.{key}="{path}"')
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "hint: " in done.stderr
    assert "▸" not in done.stderr
