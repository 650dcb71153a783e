"""One engine for the layer. In CI its absence is a failure, elsewhere a skip that says why."""

import os
from collections.abc import Iterator

import pytest

from tests.containers.engine import Engine, NoEngineError, engine


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    try:
        with engine() as running:
            yield running
    except NoEngineError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
