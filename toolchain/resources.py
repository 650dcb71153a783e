"""Files that ship beside the code: pins and target profiles. At the top of a checkout, in `_data/` of a wheel."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def resource(relative: str) -> Path:
    """Path of a shipped file or folder, such as "targets" or "docker/versions.toml"."""
    packed = _PACKAGE / "_data" / relative
    return packed if packed.exists() else _PACKAGE.parent / relative


@cache
def versions() -> dict[str, Any]:
    """Every pin outside Python's own packages: docker/versions.toml."""
    return tomllib.loads(resource("docker/versions.toml").read_text(encoding="utf-8"))
