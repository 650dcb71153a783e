"""One small bundle for the tests of what is done with bundles."""

import shutil
from pathlib import Path

import pytest

from tests.device import bundles, tiny_chat


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("built")
    model = tiny_chat.write_gguf(place / "model.gguf")
    return bundles.maker(bundles.install(place / "llama.cpp"), model, place)()


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy to do with as one likes."""
    return Path(shutil.copytree(built, tmp_path / "copy" / built.name))
