"""A folder to build images from: what git tracks, and what a machine without a network brings along."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path) -> Path:
    """A copy of the checkout's files at `folder`, uncommitted changes included."""
    argv = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines():
        source = ROOT / name
        if source.is_file() and not name.startswith(("tests/", "recipes/", "docs/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    return folder
