"""Build llama.cpp a second time, from nothing and in other surroundings: every byte must be as in the first build."""

import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

from toolchain import process
from toolchain.gguf.llama_cpp import LlamaCpp, archive_path, cache_folder
from toolchain.reporter import Reporter

_SURROUNDINGS = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7"}


def differing(first: LlamaCpp, target: str, *, report: Reporter) -> list[str]:
    """Files that are not the same in `first` and in a second build of it, below a folder of its own in the cache.

    Folder, time, umask, locale and time zone are other ones. What was fetched is not fetched again. Raises HostError,
    ExternalToolError.
    """
    with tempfile.TemporaryDirectory(prefix="again-", dir=cache_folder()) as name:
        folder = Path(name)
        shutil.copytree(archive_path().parent, folder / "downloads")
        if (cache_folder() / "cuda").is_dir():
            (folder / "cuda").symlink_to(cache_folder() / "cuda")
        report.line(f"building it again in {folder}")
        argv = [sys.executable, "-m", "toolchain.cli", "runtime", "build", "--quiet", "--target", target]
        process.run(
            ["sh", "-c", 'umask 077; exec "$@"', "sh", *argv],
            log=cache_folder() / "llama.cpp" / f"{first.key}.again.log",
            env={**_SURROUNDINGS, "TOOLCHAIN_CACHE": str(folder)},
        )
        found = _differing(first.root, folder / "llama.cpp" / first.key)
        return [name for name in found if name != first.passed.name]


def _differing(one: Path, other: Path) -> list[str]:
    names = sorted(
        {path.relative_to(root).as_posix() for root in (one, other) for path in root.rglob("*") if not path.is_dir()}
    )
    return [name for name in names if not _same(one / name, other / name)]


def _same(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and one.readlink() == other.readlink()
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
