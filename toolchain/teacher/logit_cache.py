"""How captured logits lie on disk: docs/logit-cache.md is the specification, and this is its writer and reader."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from toolchain.artifact import digest_file
from toolchain.data.rows import Row
from toolchain.errors import ArtifactError
from toolchain.teacher.bits import Array, BitReader, fields, golomb, golomb_bits, pack

NAME = "toolchain-logit-cache"
VERSION = 2
ENCODING = "ranked-golomb"
_INDEX = "index.json"
_CODEBOOK = "codebook.safetensors"
_AGAIN = "run the `capture` stage again"

_TAIL_BITS = 12
_TAIL_STEPS = 128
"""Codes of the tail mass per nat of its log-odds: half a step is 0.4 % of the mass."""
_TAIL_ZERO = 1 << (_TAIL_BITS - 1)
_TOP_ORDER = 16
"""Exp-Golomb orders that are tried: 0 to this."""
_WORTH_A_RANK = 3
"""Times that an id must come in the first shard to be ranked: its rank then saves more than the id takes there."""


@dataclass(frozen=True)
class Source:
    """What the logits were made by and for, and how they are stored; each digest is a SHA-256 in hex."""

    teacher: str
    """Digest of the teacher's weights and configuration."""
    tokenizer: str
    """vocabulary.tokenizer_digest over `vocabulary` ids."""
    template: str
    """Digest of the chat template that the rows are rendered with."""
    vocabulary: int
    """Ids that the probabilities are over: those that teacher and student share."""
    temperatures: tuple[float, ...]
    """Rising."""
    selection: Literal["top", "sample"]
    top_k: int
    top_p: float
    min_probability: float
    value_bits: int
    samples: int

    @property
    def most_entries(self) -> int:
        """Most entries that a position can have."""
        return min(self.samples if self.selection == "sample" else self.top_k, self.vocabulary)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Captured:
    """One row: `counts[i]` entries for answer token i, and the entries of all tokens one after the other."""

    counts: Array
    """int64 [answer tokens]"""
    ids: Array
    """int64 [entries]; those of a position differ"""
    values: Array
    """int64 [entries]. "top": the quantised root of the probability; "sample": times drawn, less one"""
    tails: Array
    """int64 [answer tokens, temperatures]: codes of the mass outside the entries"""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _File(_Strict):
    file: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+$")]
    bytes: int
    sha256: str


class _Kind(_Strict):
    format: str
    version: int
    encoding: str


class _Place(NamedTuple):
    shard: NonNegativeInt
    offset: NonNegativeInt
    bytes: NonNegativeInt
    tokens: PositiveInt


class _Index(_Kind):
    source: Source
    codebook: _File
    shards: tuple[_File, ...]
    rows: dict[str, _Place]


# --- Values: what is rounded, and how.


def quantise(probabilities: Array, source: Source) -> Array:
    """p at the highest temperature → steps of its root above that of `min_probability`.

    Equal steps of √p are the quantiser whose KL error, Σ δ²/2p, weighs every step alike; √p is also p at twice the
    temperature.
    """
    root = np.sqrt(probabilities) - source.min_probability**0.5
    steps: Array = np.clip(root * 2**source.value_bits, 0, 2**source.value_bits - 1)
    return steps.astype(np.int64)


def log_values(values: Array, source: Source) -> Array:
    """Stored values → log p at the highest temperature, up to a constant of the position."""
    if source.selection == "sample":
        return np.asarray(np.log(values + 1.0))
    return np.asarray(2 * np.log(source.min_probability**0.5 + (values + 0.5) / 2**source.value_bits))


def tail_codes(tails: Array) -> Array:
    """Tail masses → codes: 0 for none, else log-odds in steps of 1/128 between −16 and 16."""
    inside = np.clip(tails, 1e-9, 1 - 1e-9)
    codes = np.rint((np.log(inside) - np.log1p(-inside)) * _TAIL_STEPS).astype(np.int64) + _TAIL_ZERO
    return np.where(tails > 0, np.clip(codes, 1, 2 * _TAIL_ZERO - 1), 0)


def log_kept(codes: Array) -> Array:
    """Codes of tail masses → log of the mass that is kept."""
    return np.where(codes > 0, -np.logaddexp(0, (codes - _TAIL_ZERO) / _TAIL_STEPS), 0.0)


# --- Rows ↔ bytes.


@dataclass(frozen=True)
class Codebook:
    """How the numbers of a cache are coded: fitted to its first shard, and then the same for all."""

    frequent: Array
    """int64: ids that come often, the most frequent first; all others follow them in their own order"""
    id_order: int
    """exp-Golomb order of the gaps between the ranks of a position"""
    value_order: int
    vocabulary: int

    @classmethod
    def fit(cls, rows: Sequence[Captured], vocabulary: int) -> "Codebook":
        """The ids that come often, and the orders that take the fewest bits."""
        seen = np.bincount(np.concatenate([row.ids for row in rows]), minlength=vocabulary)
        frequent = np.argsort(-seen, kind="stable")[: np.count_nonzero(seen >= _WORTH_A_RANK)]
        ranked = cls(frequent, 0, 0, vocabulary)
        gaps = np.concatenate([ranked._gaps(row)[0] for row in rows])
        values = np.concatenate([row.values for row in rows])
        return cls(frequent, _best_order(gaps), _best_order(values), vocabulary)

    @cached_property
    def by_rank(self) -> Array:
        rare = np.ones(self.vocabulary, bool)
        rare[self.frequent] = False
        return np.concatenate([self.frequent, np.flatnonzero(rare)])

    @cached_property
    def ranks(self) -> Array:
        ranks = np.empty(self.vocabulary, np.int64)
        ranks[self.by_rank] = np.arange(self.vocabulary)
        return ranks

    def _gaps(self, row: Captured) -> tuple[Array, Array]:
        """Gaps between the rising ranks of each position, and the order of the entries in which they rise."""
        key = np.repeat(np.arange(len(row.counts)), row.counts) * self.vocabulary + self.ranks[row.ids]
        order = np.argsort(key)
        ranks = self.ranks[row.ids[order]]
        gaps = np.diff(ranks, prepend=-1) - 1
        first = np.cumsum(row.counts) - row.counts
        gaps[first] = ranks[first]
        assert int(gaps.min()) >= 0, "an id twice at one position"
        return gaps, order

    def encode(self, row: Captured, source: Source) -> bytes:
        gaps, order = self._gaps(row)
        codes = np.concatenate([gaps, row.values[order]])
        return bytes(
            pack(
                fields(row.counts - 1, _count_bits(source)),
                fields(row.tails.ravel(), _TAIL_BITS),
                golomb(codes, np.repeat([self.id_order, self.value_order], len(gaps))),
            )
        )

    def decode(self, packed: Array, tokens: int, source: Source) -> Captured:
        """The row of that many answer tokens, with rising ranks. Raises ValueError where it cannot be one."""
        reader = BitReader(packed)
        counts = reader.fields(tokens, _count_bits(source)) + 1
        tails = reader.fields(tokens * len(source.temperatures), _TAIL_BITS).reshape(tokens, -1)
        entries = int(counts.sum())
        codes = reader.golomb(np.repeat([self.id_order, self.value_order], entries))
        reader.end()
        steps = codes[:entries] + 1
        summed = np.cumsum(steps)
        first = np.cumsum(counts) - counts
        ranks = summed - np.repeat(summed[first] - steps[first], counts) - 1
        if entries and int(ranks.max()) >= self.vocabulary:
            raise ValueError(f"an id of rank {ranks.max()} among {self.vocabulary}")
        return Captured(counts, self.by_rank[ranks], codes[entries:], tails)

    def save(self, path: Path) -> None:
        kind = np.uint16 if self.vocabulary <= 1 << 16 else np.uint32
        orders = np.array([self.id_order, self.value_order], np.uint8)
        save_file({"frequent": self.frequent.astype(kind), "orders": orders}, path)

    @classmethod
    def load(cls, path: Path, vocabulary: int) -> "Codebook":
        """Raises ValueError, OSError, KeyError or SafetensorError where the file is not one."""
        tensors = load_file(path)
        frequent = tensors["frequent"].astype(np.int64)
        if len(np.unique(frequent)) != len(frequent) or (len(frequent) and int(frequent.max()) >= vocabulary):
            raise ValueError("its ids repeat, or are not in the vocabulary")
        id_order, value_order = (int(order) for order in tensors["orders"])
        if max(id_order, value_order) > _TOP_ORDER:
            raise ValueError(f"orders {id_order} and {value_order}")
        return cls(frequent, id_order, value_order, vocabulary)


def _best_order(values: Array) -> int:
    return min(range(_TOP_ORDER + 1), key=lambda order: golomb_bits(values, order))


def _count_bits(source: Source) -> int:
    return max(1, (source.most_entries - 1).bit_length())


# --- Files.


class Writer:
    """Writes shard after shard into `out`/resume/, where they survive a kill, and then the cache into `out`."""

    def __init__(self, out: Path, source: Source) -> None:
        self.out = out
        self.source = source
        self.draft = out / "resume"
        self.draft.mkdir(exist_ok=True)

    def has(self, shard: int, keys: Sequence[str]) -> bool:
        """Whether this shard was written whole before a restart: of these rows, this source, the present codebook."""
        try:
            note = json.loads((self.draft / _note(shard)).read_text(encoding="utf-8"))
            return (
                [row[0] for row in note["rows"]] == list(keys)
                and note["source"] == self.source.digest
                and note["sha256"] == digest_file(self.draft / _shard(shard))
                and note["codebook"] == digest_file(self.draft / _CODEBOOK)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write(self, shard: int, rows: Iterable[tuple[str, Captured]]) -> None:
        """Write one shard, 0 before all others: it makes the codebook. Rows are (key, content)."""
        named = list(rows)
        for key, row in named:
            _check(row, self.source, f"row {key[:12]}")
        if shard == 0:
            fitted = Codebook.fit([row for _, row in named], self.source.vocabulary)
            _write_whole(self.draft / _CODEBOOK, fitted.save)
        codebook = Codebook.load(self.draft / _CODEBOOK, self.source.vocabulary)
        places: list[list[Any]] = []
        packed: list[bytes] = []
        offset = 0
        for key, row in named:
            packed.append(codebook.encode(row, self.source))
            places.append([key, offset, len(packed[-1]), len(row.counts)])
            offset += len(packed[-1])
        path = self.draft / _shard(shard)
        tensor = np.frombuffer(b"".join(packed), np.uint8)
        _write_whole(path, lambda draft: save_file({"rows": tensor}, draft))
        # The note comes last: a shard without one is not there.
        note = {
            "sha256": digest_file(path),
            "bytes": path.stat().st_size,
            "entries": sum(len(row.ids) for _, row in named),
            "source": self.source.digest,
            "codebook": digest_file(self.draft / _CODEBOOK),
            "rows": places,
        }
        text = json.dumps(note)
        _write_whole(self.draft / _note(shard), lambda draft: draft.write_text(text, encoding="utf-8"))

    def finish(self, shards: int) -> dict[str, int]:
        """Put the shards 0 … `shards` − 1 and their index into `out`; returns rows, tokens, entries, bytes (of all)."""
        rows: dict[str, list[int]] = {}
        files: list[dict[str, Any]] = []
        entries = 0
        for number in range(shards):
            note = json.loads((self.draft / _note(number)).read_text(encoding="utf-8"))
            for key, *place in note["rows"]:
                rows[key] = [number, *place]
            entries += note["entries"]
            files.append(self._put(_shard(number)))
        codebook = self._put(_CODEBOOK)
        index = {
            "format": NAME,
            "version": VERSION,
            "encoding": ENCODING,
            "source": asdict(self.source),
            "codebook": codebook,
            "shards": files,
        }
        # A row is a line: a person can read the file, and it stays small.
        head = json.dumps(index, indent=1).removesuffix("\n}")
        lines = ",\n".join(f'"{key}":{json.dumps(place, separators=(",", ":"))}' for key, place in sorted(rows.items()))
        (self.out / _INDEX).write_text(f'{head},\n "rows": {{\n{lines}\n}}\n}}\n', encoding="utf-8")
        return {
            "rows": len(rows),
            "tokens": sum(place[3] for place in rows.values()),
            "entries": entries,
            "bytes": sum(file["bytes"] for file in [*files, codebook]) + (self.out / _INDEX).stat().st_size,
        }

    def _put(self, name: str) -> dict[str, Any]:
        """A link, not a move: after a kill from here on the file is still in resume/."""
        draft, final = self.draft / name, self.out / name
        final.unlink(missing_ok=True)
        try:
            os.link(draft, final)
        except OSError:
            shutil.copyfile(draft, final)
        return {"file": name, "bytes": draft.stat().st_size, "sha256": digest_file(draft)}


class Reader:
    """Rows of a cache by key. Every way in which it could be the wrong cache, or damaged, is an ArtifactError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / _INDEX
        try:
            text = path.read_bytes()
            kind = _Kind.model_validate_json(text)
            if (kind.format, kind.version, kind.encoding) != (NAME, VERSION, ENCODING):
                raise ArtifactError(
                    f"{path}: {kind.format} {kind.version} {kind.encoding}, this program reads "
                    f"{NAME} {VERSION} {ENCODING}",
                    hint=_AGAIN,
                )
            self._index = _Index.model_validate_json(text)
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{path}: not the index of a logit cache: {error}", hint=_AGAIN) from error
        self.source = self._index.source
        self._codebook: Codebook = self._opened(
            self._index.codebook, lambda file: Codebook.load(file, self.source.vocabulary)
        )
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the shards anew."""
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return len(self._index.rows)

    def expect(self, **wanted: str | int) -> None:
        """Compare fields of Source, such as tokenizer="…", vocabulary=…, with what the cache was made from."""
        for name, value in wanted.items():
            found = getattr(self.source, name)
            if found != value:
                raise ArtifactError(
                    f"{self.folder}: captured with {name} {_shown(found)}, used with {name} {_shown(value)}",
                    hint=_AGAIN,
                )

    def check(self, rows: Iterable[Row], temperature: float) -> None:
        """See that every row can be read at `temperature`, and that the shards they lie in are undamaged."""
        self._column(temperature)
        for number in {self._place(row).shard for row in rows}:
            self._shard(number)

    def _column(self, temperature: float) -> int:
        if temperature not in self.source.temperatures:
            raise ArtifactError(
                f"{self.folder}: captured for temperatures {list(self.source.temperatures)}, not {temperature}",
                hint="add it to capture.temperatures; " + _AGAIN,
            )
        return self.source.temperatures.index(temperature)

    def _place(self, row: Row) -> _Place:
        place = self._index.rows.get(row.key)
        if place is None:
            raise ArtifactError(
                f"{self.folder}: row {row.id} was not captured: no entry for its {len(row.token_ids)} token ids",
                hint="the rows changed after the capture, or have other token ids; " + _AGAIN,
            )
        if place.tokens != len(row.answer_ids):
            raise ArtifactError(
                f"{self.folder}: teacher logits of the wrong length: row {row.id} has {len(row.answer_ids)} answer "
                f"tokens, {place.tokens} were captured",
                hint=_AGAIN,
            )
        return place

    def read(self, row: Row) -> Captured:
        """What the teacher says about a row's answer."""
        place = self._place(row)
        where = f"{self.folder}: row {row.id}"
        try:
            packed = self._shard(place.shard).get_slice("rows")[place.offset : place.offset + place.bytes]
            captured = self._codebook.decode(packed, place.tokens, self.source)
        except (ValueError, IndexError, SafetensorError) as error:
            raise ArtifactError(f"{where}: its bytes do not decode: {error}", hint=_AGAIN) from error
        _check(captured, self.source, where)
        return captured

    def at_temperature(self, row: Row, temperature: float) -> tuple[Array, Array]:
        """Ids int64 and log p_T float32, both [answer tokens, K]; slots past a token's own number hold −inf."""
        column = self._column(temperature)
        captured = self.read(row)
        # What the values are is known up to a constant; the mass that they share is known.
        logs = log_values(captured.values, self.source) * (self.source.temperatures[-1] / temperature)
        first = np.cumsum(captured.counts) - captured.counts
        logs -= np.repeat(np.maximum.reduceat(logs, first), captured.counts)
        kept = log_kept(captured.tails[:, column])
        logs += np.repeat(kept - np.log(np.add.reduceat(np.exp(logs), first)), captured.counts)
        filled = np.arange(int(captured.counts.max())) < captured.counts[:, None]
        ids = np.zeros(filled.shape, np.int64)
        ids[filled] = captured.ids
        logprobs = np.full(filled.shape, -np.inf, np.float32)
        logprobs[filled] = logs
        return ids, logprobs

    def _shard(self, number: int) -> Any:
        """The shard, memory-mapped; its bytes are checked when it is first used."""
        if number not in self._open:
            self._open[number] = self._opened(self._index.shards[number], _open_shard)
        return self._open[number]

    def _opened(self, note: _File, open_file: Callable[[Path], Any]) -> Any:
        path = self.folder / note.file
        try:
            if path.stat().st_size != note.bytes or digest_file(path) != note.sha256:
                raise ArtifactError(f"{path}: damaged: its SHA-256 is not the one in {_INDEX}", hint=_AGAIN)
            return open_file(path)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ArtifactError(f"{path}: cannot be read: {error}", hint=_AGAIN) from error


def _check(row: Captured, source: Source, where: str) -> None:
    def refuse(problem: str) -> None:
        raise ArtifactError(f"{where}: {problem}", hint=_AGAIN)

    if int(row.counts.sum()) != len(row.ids) or len(row.ids) != len(row.values):
        refuse("counts and entries do not fit each other")
    if len(row.counts) == 0 or int(row.counts.min()) < 1 or int(row.counts.max()) > source.most_entries:
        refuse(f"a position has no entries, or more than {source.most_entries}")
    if int(row.ids.min()) < 0 or int(row.ids.max()) >= source.vocabulary:
        refuse(f"an id is not below {source.vocabulary}")
    if row.tails.shape != (len(row.counts), len(source.temperatures)):
        refuse(f"tail masses of the shape {row.tails.shape}")
    if int(row.tails.min()) < 0 or int(row.tails.max()) >= 1 << _TAIL_BITS:
        refuse(f"a tail mass does not fit {_TAIL_BITS} bits")
    if source.selection == "sample":
        drawn = np.add.reduceat(row.values + 1, np.cumsum(row.counts) - row.counts)
        if int(row.values.min()) < 0 or (drawn != source.samples).any() or row.tails.any():
            refuse(f"a position has not {source.samples} samples")
    elif int(row.values.min()) < 0 or int(row.values.max()) >= 1 << source.value_bits:
        refuse(f"a value does not fit {source.value_bits} bits")


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


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a draft name, flush, rename: the name stands for the whole file."""
    draft = path.with_name(path.name + ".draft")
    write(draft)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
