"""How captured logits lie on disk: docs/logit-cache.md is the specification, and this is its writer and reader."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from toolchain.data.rows import Row
from toolchain.errors import ArtifactError

Array = np.ndarray[Any, np.dtype[Any]]

NAME = "toolchain-logit-cache"
VERSION = 1
ENCODING = "csr-f16"
_INDEX = "index.json"
_AGAIN = "run the `capture` stage again"


@dataclass(frozen=True)
class Source:
    """What the logits were made by and for; each digest is a SHA-256 in hex."""

    teacher: str
    """Digest of the teacher's weights and configuration."""
    tokenizer: str
    """vocabulary.tokenizer_digest over `vocabulary` ids."""
    template: str
    vocabulary: int
    """Ids that the probabilities are over: those that teacher and student share."""
    temperatures: tuple[float, ...]
    top_k: int
    top_p: float


@dataclass(frozen=True)
class Captured:
    """One row: `counts[i]` entries for answer token i, entries of all tokens one after the other, likeliest first."""

    counts: Array
    """uint16 [answer tokens]"""
    ids: Array
    """integer [entries]"""
    logprobs: Array
    """float16 [entries]: log p at T = 1"""
    normalisers: Array
    """float32 [answer tokens, temperatures]: c_T, so that log p_T = logprobs / T + c_T"""


@dataclass(frozen=True)
class _Place:
    shard: int
    token: int
    tokens: int
    entry: int
    entries: int


def id_type(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that holds every id."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


class Writer:
    """Writes shard after shard into `out`/resume/, where they survive a kill, and then the cache into `out`."""

    def __init__(self, out: Path, source: Source) -> None:
        self.out = out
        self.source = source
        self.draft = out / "resume"
        self.draft.mkdir(exist_ok=True)

    def has(self, shard: int, keys: Sequence[str]) -> bool:
        """Whether this shard was written whole, with these rows, before a restart."""
        try:
            note = json.loads((self.draft / _note(shard)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        path = self.draft / _shard(shard)
        return [row[0] for row in note["rows"]] == list(keys) and path.exists() and _sha256(path) == note["sha256"]

    def write(self, shard: int, rows: Iterable[tuple[str, Captured]]) -> None:
        """Write one shard; rows are (key, content). Raises ArtifactError when a value is not finite."""
        named = list(rows)
        token = entry = 0
        places: list[list[Any]] = []
        for key, row in named:
            _check(row, self.source, f"row {key[:12]}")
            places.append([key, token, len(row.counts), entry, len(row.ids)])
            token += len(row.counts)
            entry += len(row.ids)
        path = self.draft / _shard(shard)
        draft = path.with_suffix(".draft")
        save_file(
            {
                "counts": np.concatenate([row.counts for _, row in named]).astype(np.uint16),
                "ids": np.concatenate([row.ids for _, row in named]).astype(id_type(self.source.vocabulary)),
                "logprobs": np.concatenate([row.logprobs for _, row in named]).astype(np.float16),
                "normalisers": np.concatenate([row.normalisers for _, row in named]).astype(np.float32),
            },
            draft,
        )
        _flush(draft)
        draft.replace(path)
        # The note comes last: a shard without one is not there.
        note = self.draft / _note(shard)
        draft = note.with_suffix(".draft")
        text = json.dumps({"sha256": _sha256(path), "bytes": path.stat().st_size, "rows": places})
        draft.write_text(text, encoding="utf-8")
        _flush(draft)
        draft.replace(note)

    def finish(self, shards: int) -> dict[str, int]:
        """Put the shards 0 … `shards` − 1 and their index into `out`; returns rows, tokens, entries, bytes."""
        rows: dict[str, list[int]] = {}
        files: list[dict[str, Any]] = []
        for number in range(shards):
            note = json.loads((self.draft / _note(number)).read_text(encoding="utf-8"))
            for key, *place in note["rows"]:
                rows[key] = [number, *place]
            files.append({"file": _shard(number), "bytes": note["bytes"], "sha256": note["sha256"]})
            try:
                # A link, not a move: after a kill from here on the shard is still in resume/.
                os.link(self.draft / _shard(number), self.out / _shard(number))
            except OSError:
                shutil.copyfile(self.draft / _shard(number), self.out / _shard(number))
        index = {
            "format": NAME,
            "version": VERSION,
            "encoding": ENCODING,
            **asdict(self.source),
            "shards": files,
            "rows": dict(sorted(rows.items())),
        }
        (self.out / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        return {
            "rows": len(rows),
            "tokens": sum(place[2] for place in rows.values()),
            "entries": sum(place[4] for place in rows.values()),
            "bytes": sum(file["bytes"] for file in files),
        }


class Reader:
    """Rows of a cache by key. Every way in which it could be the wrong cache, or damaged, is an ArtifactError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / _INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if (index["format"], index["version"], index["encoding"]) != (NAME, VERSION, ENCODING):
                raise ArtifactError(
                    f"{path}: {index['format']} {index['version']} {index['encoding']}, this program reads "
                    f"{NAME} {VERSION} {ENCODING}",
                    hint=_AGAIN,
                )
            fields = {name: index[name] for name in Source.__dataclass_fields__}
            self.source = Source(**{**fields, "temperatures": tuple(index["temperatures"])})
            self._shards: list[dict[str, Any]] = index["shards"]
            self._places = {key: _Place(*place) for key, place in index["rows"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: not the index of a logit cache: {error}", hint=_AGAIN) from error
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def expect(self, **wanted: str | int) -> None:
        """Compare fields of Source, such as tokenizer="…", vocabulary=…, with what the cache was made from."""
        for name, value in wanted.items():
            found = getattr(self.source, name)
            if found != value:
                raise ArtifactError(
                    f"{self.folder}: captured with {name} {_shown(found)}, used with {name} {_shown(value)}",
                    hint=_AGAIN,
                )

    def read(self, row: Row) -> Captured:
        """What the teacher says about a row's answer."""
        place = self._places.get(row.key)
        if place is None:
            raise ArtifactError(
                f"{self.folder}: row {row.id} was not captured: no entry for its {len(row.token_ids)} token ids",
                hint="the rows changed after the capture, or have other token ids; " + _AGAIN,
            )
        if place.tokens != len(row.answer_ids):
            raise ArtifactError(
                f"{self.folder}: row {row.id} has {len(row.answer_ids)} answer tokens, {place.tokens} were captured",
                hint=_AGAIN,
            )
        shard = self._shard(place.shard)
        tokens = slice(place.token, place.token + place.tokens)
        entries = slice(place.entry, place.entry + place.entries)
        captured = Captured(
            shard.get_slice("counts")[tokens],
            shard.get_slice("ids")[entries],
            shard.get_slice("logprobs")[entries],
            shard.get_slice("normalisers")[tokens],
        )
        _check(captured, self.source, f"{self.folder}: row {row.id}")
        return captured

    def at_temperature(self, row: Row, temperature: float) -> tuple[Array, Array]:
        """Ids int64 and log p_T float32, both [answer tokens, K]; slots past a token's own number hold −inf."""
        if temperature not in self.source.temperatures:
            raise ArtifactError(
                f"{self.folder}: captured for temperatures {list(self.source.temperatures)}, not {temperature}",
                hint="add it to capture.temperatures; " + _AGAIN,
            )
        captured = self.read(row)
        c = captured.normalisers[:, self.source.temperatures.index(temperature)]
        counts = captured.counts.astype(np.int64)
        width = int(counts.max())
        filled = np.arange(width) < counts[:, None]
        ids = np.zeros(filled.shape, np.int64)
        ids[filled] = captured.ids
        logprobs = np.full(filled.shape, -np.inf, np.float32)
        logprobs[filled] = captured.logprobs.astype(np.float32) / np.float32(temperature) + np.repeat(c, counts)
        return ids, logprobs

    def _shard(self, number: int) -> Any:
        """The shard, memory-mapped; its bytes are checked when it is first used."""
        if number not in self._open:
            note = self._shards[number]
            path = self.folder / note["file"]
            try:
                if path.stat().st_size != note["bytes"] or _sha256(path) != note["sha256"]:
                    raise ArtifactError(f"{path}: damaged: its SHA-256 is not the one in {_INDEX}", hint=_AGAIN)
                self._open[number] = _open_shard(path)
            except (OSError, SafetensorError) as error:
                raise ArtifactError(f"{path}: cannot be read: {error}", hint=_AGAIN) from error
        return self._open[number]


def compress(
    ids: Array, logprobs: Array, counts: Array, kept_mass: Mapping[float, Array], *, vocabulary: int
) -> Captured:
    """Round to the stored types and fit c_T to what is stored.

    `ids`, `logprobs` [tokens, K], likeliest first, of which `counts` [tokens] stay; `kept_mass[T]` float64 [tokens] is
    log Σ p_T over those that stay. c_T is set so that the *rounded* entries have this mass: rounding to float16 then
    moves mass among the kept entries only, never into or out of the tail.
    """
    filled = np.arange(ids.shape[1]) < counts[:, None]
    rounded = logprobs.astype(np.float16)
    exact = np.where(filled, rounded.astype(np.float64), -np.inf)
    normalisers = []
    for temperature, mass in sorted(kept_mass.items()):
        scaled = exact / temperature
        top = scaled.max(-1)
        normalisers.append(mass - (top + np.log(np.exp(scaled - top[:, None]).sum(-1))))
    return Captured(
        counts.astype(np.uint16),
        ids[filled].astype(id_type(vocabulary)),
        rounded[filled],
        np.stack(normalisers, -1).astype(np.float32),
    )


def _check(row: Captured, source: Source, where: str) -> None:
    if not (np.isfinite(row.logprobs).all() and np.isfinite(row.normalisers).all()):
        raise ArtifactError(f"{where}: a stored value is not finite", hint=_AGAIN)
    if int(row.counts.astype(np.int64).sum()) != len(row.ids) or len(row.ids) != len(row.logprobs):
        raise ArtifactError(f"{where}: counts and entries do not fit each other", hint=_AGAIN)
    if len(row.counts) and (int(row.counts.min()) < 1 or int(row.counts.max()) > source.top_k):
        raise ArtifactError(f"{where}: a position has no entries, or more than {source.top_k}", hint=_AGAIN)
    if len(row.ids) and int(row.ids.max()) >= source.vocabulary:
        raise ArtifactError(f"{where}: id {int(row.ids.max())} is not below {source.vocabulary}", hint=_AGAIN)


def _open_shard(path: Path) -> Any:
    # Without `with`: the map stays open for as long as the reader lives.
    opened: Any = safe_open(path, framework="numpy")
    return opened


def _shown(value: object) -> str:
    return f"sha256:{value[:12]}" if isinstance(value, str) and len(value) == 64 else str(value)


def _shard(number: int) -> str:
    return f"shard-{number:05}.safetensors"


def _note(number: int) -> str:
    return f"shard-{number:05}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
