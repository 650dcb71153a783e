"""What docker/versions.toml pins, brought into the cache once: no file is used before its SHA-256 is found right."""

import fcntl
import hashlib
import json
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.artifact import digest_file
from toolchain.disk import require_free
from toolchain.errors import ExternalToolError, HostError
from toolchain.reporter import Reporter

_TIMEOUT_S = 60.0
_TRIES = 3


@contextmanager
def lock(path: Path, report: Reporter, *, doing: str) -> Iterator[None]:
    """Hold `path` for the length of a `with` block; the kernel lets go when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.line(f"another process is {doing}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(
    home: Path,
    pins: Sequence[dict[str, Any]],
    fill: Callable[[Path], None],
    *,
    what: str,
    needed: int,
    report: Reporter,
) -> Path:
    """The folder below `home` that `fill` makes of `pins`: made at the first call, whole or not at all.

    `fill` gets an empty folder; what lies beside that is kept until it is done. Raises HostError without room.
    """
    key = hashlib.sha256(json.dumps(pins, sort_keys=True).encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    final = home / key
    with lock(home / f"{key}.lock", report, doing=f"making {what}"):
        if not final.is_dir():
            require_free(home, needed, what, hint="free some space, or set TOOLCHAIN_CACHE")
            draft = home / f"{key}.partial"
            shutil.rmtree(draft / "made", ignore_errors=True)
            (draft / "made").mkdir(parents=True)
            fill(draft / "made")
            (draft / "made").rename(final)
            shutil.rmtree(draft)
    return final


def from_index(
    name: str, version: str, sha256: str, folder: Path, *, options: Sequence[str], log: Path, hint: str
) -> Path:
    """The one file of a package that pip fetches into `folder`; one that a killed call left whole is not fetched again.

    `options` say which kind of file. Raises ExternalToolError when it cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".whl", ".gz") and digest_file(path) == sha256:
            return path
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    process.run(pip_argv(requirements, folder, options), log=log, hint=hint)
    requirements.unlink()
    (path,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    check_digest(path, sha256)
    return path


def pip_argv(requirements: Path, out: Path, options: Sequence[str]) -> list[str]:
    """pip, told to take one kind of file and nothing that its digest does not name."""
    fixed = ["--no-deps", "--require-hashes", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "download", *fixed, *options, "-d", str(out), "-r", str(requirements)]


def from_mirrors(mirrors: Sequence[str], file: str, sha256: str, out: Path) -> None:
    """`file` of the first mirror that gives it, at `out`. Raises ExternalToolError, with what each one said."""
    if out.is_file():
        check_digest(out, sha256)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(out.name + ".partial")
    said = []
    for url in [f"{mirror}/{file}" for mirror in mirrors] * _TRIES:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as source, draft.open("wb") as target:  # noqa: S310
                shutil.copyfileobj(source, target)
            check_digest(draft, sha256)
            draft.rename(out)
        except (urllib.error.URLError, OSError, HostError) as error:
            said.append(f"{url}: {getattr(error, 'reason', None) or error}")
            continue
        finally:
            draft.unlink(missing_ok=True)
        return
    raise ExternalToolError(
        f"{out.name} cannot be had: {'; '.join(dict.fromkeys(said))}",
        hint=f"a mirror must be reachable, or put the file there yourself: {out}",
    )


def check_digest(path: Path, expected: str) -> None:
    """Raises HostError when the file is another one."""
    found = digest_file(path)
    if found != expected:
        raise HostError(
            f"{path}: SHA-256 is {found}, docker/versions.toml pins {expected}",
            hint=f"delete {path}, then run again",
        )


def tar_filter() -> dict[str, Any]:
    """For unpacking what a digest vouches for. Python before 3.11.4, as in Debian 12 and Ubuntu 22.04, has none."""
    return {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
