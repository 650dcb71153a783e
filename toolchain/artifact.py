"""A stage's output: digests, manifest, commit by rename, verification. See docs/stage-contract.md.

A directory without the suffix `.partial` is complete. Its manifest says what was asked for (fingerprint, settings,
input digests) and what was obtained (files with SHA-256, versions, metrics).
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from toolchain.device.files import sha256
from toolchain.device.place import sync
from toolchain.errors import ArtifactError, HostError

MANIFEST = "manifest.json"
RESUME = "resume"
LOGS = "logs"
REFERENCE = "reference.json"
"""In an artifact that is a checkpoint elsewhere: where it lies."""
CHECKPOINT = "checkpoint"
"""Folder of an artifact that holds a checkpoint itself."""
SCHEMA_VERSION = 1


class FileRecord(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The proof of what an artifact is."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int
    stage: str
    stage_version: int
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileRecord]
    metrics: dict[str, Any]
    tools: dict[str, str]
    host: dict[str, Any]
    started: str
    seconds: float

    @property
    def digest(self) -> str:
        """Content digest: over paths and bytes alone, so that equal files give equal digests wherever they were made.

        An artifact that only refers to a checkpoint elsewhere counts as the content of that checkpoint.
        """
        if set(self.files) == {REFERENCE}:
            return self.inputs["model"]
        return digest_of({path: record.sha256 for path, record in self.files.items()})


@dataclass(frozen=True)
class Artifact:
    """A committed output directory."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest


def digest_of(value: object) -> str:
    """SHA-256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 of what is asked for: stage, version, settings and the content digests of the inputs."""
    return digest_of({"stage": stage, "version": version, "settings": settings, "inputs": inputs})


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return sha256(path)


def _files_below(folder: Path) -> Iterator[Path]:
    """Regular files, in order; hidden ones (.git, .cache of a hub's client) are not content."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


class Digests:
    """SHA-256 of inputs from outside, remembered by path, size, time and inode: a 16 GB teacher is read once, not at
    every `plan`. Forgetting the file costs time only."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        try:
            self._known: dict[str, list[Any]] = json.loads(memo.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path) -> str:
        """Digest of a file, or of a folder's files with their names. Raises ArtifactError."""
        if path.is_dir():
            return digest_of({str(file.relative_to(path)): self._of_file(file) for file in _files_below(path)})
        return self._of_file(path)

    def _of_file(self, path: Path) -> str:
        try:
            state = path.stat()
            stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
            known = self._known.get(str(path))
            if known is not None and known[:3] == stamp:
                return str(known[3])
            digest = digest_file(path)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        # A file written within the clock's grain of our reading could change again under the same stamp.
        if time.time_ns() - state.st_mtime_ns > 2_000_000_000:
            self._known[str(path)] = [*stamp, digest]
            self._save()
        return digest

    def _save(self) -> None:
        try:
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._memo, json.dumps(self._known, indent=0))
        except OSError:
            pass  # only a memo


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` as a whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def partial_of(final: Path) -> Path:
    return final.with_name(final.name + ".partial")


def clean_partial(final: Path) -> tuple[Path, bool]:
    """The directory to work in, empty but for `resume/`; and whether there is something to resume from."""
    partial = partial_of(final)
    partial.mkdir(parents=True, exist_ok=True)
    for entry in partial.iterdir():
        if entry.name != RESUME:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    resume = partial / RESUME
    return partial, resume.is_dir() and any(resume.iterdir())


@dataclass(frozen=True)
class Order:
    """What a stage was asked for."""

    stage: str
    version: int
    settings: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.stage, self.version, self.settings, self.inputs)


def commit(
    final: Path,
    order: Order,
    *,
    metrics: dict[str, Any],
    started_s: float,
    tools: dict[str, str],
    known: Mapping[str, str] | None = None,
) -> Artifact:
    """Hash, write the manifest, flush everything, rename into place. Raises HostError when the disk is full.

    `known`, path → SHA-256, are digests that the stage took as it wrote: those files are not read a second time.
    """
    partial, known = partial_of(final), known or {}
    try:
        files = {
            str(path.relative_to(partial)): path
            for path in sorted(partial.rglob("*"))
            if path.is_file() and path.relative_to(partial).parts[0] not in (RESUME, LOGS, MANIFEST)
        }
        if not files:
            raise ArtifactError(f"stage {order.stage} left no files")
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            stage=order.stage,
            stage_version=order.version,
            fingerprint=order.fingerprint,
            settings=order.settings,
            inputs=order.inputs,
            files={
                name: FileRecord(bytes=path.stat().st_size, sha256=known.get(name) or digest_file(path))
                for name, path in files.items()
            },
            metrics=metrics,
            tools=tools,
            host={"machine": os.uname().machine, "kernel": os.uname().release, "cpus": os.cpu_count()},
            started=datetime.fromtimestamp(started_s, UTC).isoformat(timespec="seconds"),
            seconds=round(time.time() - started_s, 3),
        )
        umask = os.umask(0)
        os.umask(umask)
        for path in files.values():
            _let_read(path, 0o444 & ~umask)
            sync(path)
        write_atomic(partial / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        for name in (RESUME, LOGS):
            shutil.rmtree(partial / name, ignore_errors=True)
        sync(partial)
        partial.rename(final)
        sync(final.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            hint = f"free some space, then run again: what is done is kept in {partial}"
            raise HostError(f"no space left on the disk while finishing {order.stage}", hint=hint) from error
        raise
    return Artifact(final, manifest)


def _let_read(path: Path, modes: int) -> None:
    """safetensors keeps what it writes from everybody else, and others read it: another user in a container."""
    found = path.lstat()
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_mode & modes != modes:
        path.chmod(stat.S_IMODE(found.st_mode) | modes)


def open_artifact(
    path: Path, *, expect: str | None = None, verify: bool = False, unread: tuple[str, ...] = ()
) -> Artifact:
    """Open a committed directory: manifest whole, fingerprint as expected, every file there at its size.

    `verify` hashes the bytes as well, but for the `unread` files, which the caller hashes himself. Raises
    ArtifactError, naming the file that does not fit.
    """
    remedy = f"remove {path} and run the stage again"
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no {MANIFEST}", hint=remedy) from None
    except (ValidationError, UnicodeDecodeError):
        raise ArtifactError(f"{path / MANIFEST}: is damaged", hint=remedy) from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(f"{path}: manifest schema {manifest.schema_version}, not {SCHEMA_VERSION}", hint=remedy)
    asked = fingerprint(manifest.stage, manifest.stage_version, manifest.settings, manifest.inputs)
    if manifest.fingerprint != asked or (expect is not None and manifest.fingerprint != expect):
        raise ArtifactError(f"{path / MANIFEST}: fingerprint does not fit what it was made from", hint=remedy)
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file}: is missing", hint=remedy)
        if file.stat().st_size != record.bytes:
            raise ArtifactError(f"{file}: has {file.stat().st_size} bytes, not {record.bytes}", hint=remedy)
        if verify and name not in unread and digest_file(file) != record.sha256:
            raise ArtifactError(f"{file}: its bytes have changed since it was made", hint=remedy)
    return Artifact(path, manifest)


@contextmanager
def lock(work: Path, *, what: str) -> Iterator[None]:
    """Keep a work directory to one run. Raises HostError that says who holds it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise HostError(f"{work}: cannot be used as the work folder: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 4096, 0).decode(errors="replace").strip() or "another run"
            hint = "wait until it ends, or give this run a work folder of its own (--work)"
            raise HostError(f"{work} is in use by {holder}", hint=hint) from None
        os.ftruncate(handle, 0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} ({what}) since {since}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def base_tools() -> dict[str, str]:
    """Versions that every manifest records."""
    from toolchain import __version__

    return {"toolchain": __version__, "python": sys.version.split()[0]}
