"""What several files of this folder start from."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.stages.published import Published
from tests.stages.recipe_files import make_recipe, toolchain
from toolchain import errors
from toolchain.gguf import llama_cpp
from toolchain.target import read_target


@pytest.fixture(scope="session")
def llama() -> llama_cpp.LlamaCpp:
    try:
        return llama_cpp.find(read_target("x86-cpu").runtime.cmake)
    except errors.HostError as error:
        pytest.skip(error.message)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("published"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """So tiny a model gains nothing from more, and on a busy machine threads wait for each other."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def done(llama: llama_cpp.LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose stages have run up to the ledger; tests leave it as it is."""
    recipe = make_recipe(tmp_path_factory.mktemp("tiny"))
    ran = toolchain(recipe, "run", "--until", "evaluate")
    assert ran.returncode == 0, ran.stderr
    return recipe


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """The same, to spoil."""
    shutil.copytree(done.parent, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy" / "recipe.toml"
