"""The cache on disk: what goes in comes out, and nothing wrong comes out silently."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from toolchain.data.rows import Message, Row
from toolchain.errors import ArtifactError
from toolchain.teacher.logit_cache import Captured, Reader, Source, Writer, log_kept, log_values, quantise, tail_codes

TEMPERATURES = (1.0, 2.0, 4.0)
VOCABULARY = 300
SOURCE = Source("a" * 64, "b" * 64, "c" * 64, VOCABULARY, TEMPERATURES, "top", 20, 0.9, 0.0, 10, 1)
COUNTS = np.array([1, 20, 7, 3, 20])


def _row(number: int, tokens: int = 5) -> Row:
    return Row(f"row-{number}", (Message("user", "q"),), "a", (1, 2, number), tuple(range(3, 3 + tokens)), "stop")


def _log_softmax(logits: Any) -> Any:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def _captured(logits: Any, counts: Any, source: Source = SOURCE) -> Captured:
    """The `counts` likeliest ids of each position, and the mass of the others."""
    ids = np.argsort(-logits, axis=-1)[:, : counts.max()]
    kept = np.arange(ids.shape[1]) < counts[:, None]
    p = [np.exp(np.take_along_axis(_log_softmax(logits / t), ids, -1)) * kept for t in source.temperatures]
    tails = np.stack([1 - part.sum(-1) for part in p], -1)
    return Captured(counts.copy(), ids[kept], quantise(p[-1][kept], source), tail_codes(tails))


def _logits(seed: int, tokens: int = 5) -> Any:
    return np.random.default_rng(seed).normal(scale=3.0, size=(tokens, VOCABULARY))


def _cache(out: Path) -> tuple[Path, list[Row]]:
    out.mkdir()
    writer = Writer(out, SOURCE)
    rows = [_row(number) for number in range(4)]
    for shard in range(2):
        members = rows[2 * shard : 2 * shard + 2]
        writer.write(shard, [(row.key, _captured(_logits(row.prompt_ids[2]), COUNTS)) for row in members])
    figures = writer.finish(2)
    assert figures["rows"] == 4
    assert figures["tokens"] == 20
    assert figures["entries"] == 4 * int(COUNTS.sum())
    assert figures["bytes"] == sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    return out, rows


def _edit(folder: Path, change: dict[str, Any]) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **change}))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_and_tail_mass_come_back_at_every_temperature(tmp_path: Path, temperature: float) -> None:
    folder, rows = _cache(tmp_path / "cache")
    reader = Reader(folder)
    assert len(reader) == 4
    for row in reversed(rows):
        ids, logprobs = reader.at_temperature(row, temperature)
        expected = np.exp(_log_softmax(_logits(row.prompt_ids[2]) / temperature))
        filled = np.isfinite(logprobs)
        assert (filled.sum(-1) == COUNTS).all()
        for at in range(5):
            found = ids[at][filled[at]]
            assert sorted(found) == sorted(np.argsort(-expected[at])[: COUNTS[at]])
            p = np.exp(logprobs[at][filled[at]].astype(np.float64))
            assert np.abs(p - expected[at][found]).max() < 0.02
            tail = 1 - expected[at][found].sum()
            assert 1 - p.sum() == pytest.approx(tail, rel=0.004, abs=1e-6), "the tail mass is exact to half a step"


def test_a_reader_written_from_the_specification_alone_finds_the_same(tmp_path: Path) -> None:
    """docs/logit-cache.md, bit by bit, with no code of the project."""
    folder, rows = _cache(tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text())
    book = load_file(folder / "codebook.safetensors")
    frequent = [int(number) for number in book["frequent"]]
    by_rank = frequent + [number for number in range(index["source"]["vocabulary"]) if number not in set(frequent)]
    for row in rows:
        shard, offset, size, tokens = index["rows"][row.key]
        packed = load_file(folder / index["shards"][shard]["file"])["rows"][offset : offset + size]
        bits = iter([int(byte) >> at & 1 for byte in packed for at in range(8)])

        def number(width: int, bits: Any = bits) -> int:
            return sum(next(bits) << at for at in range(width))

        def zeros(bits: Any = bits) -> int:
            count = 0
            while next(bits) == 0:
                count += 1
            return count

        counts = [number(5) + 1 for _ in range(tokens)]  # 5 bits hold 20 − 1
        tails = [[number(12) for _ in TEMPERATURES] for _ in range(tokens)]
        orders = [int(book["orders"][kind]) for kind in (0, 1) for _ in range(sum(counts))]
        classes = [zeros() for _ in orders]
        codes = [(((1 << c) - 1) << order) + number(c + order) for c, order in zip(classes, orders, strict=True)]
        gaps, values = iter(codes[: sum(counts)]), iter(codes[sum(counts) :])
        for temperature in TEMPERATURES:
            ids, logprobs = Reader(folder).at_temperature(row, temperature)
            if temperature != TEMPERATURES[0]:
                continue
            for at, count in enumerate(counts):
                rank, found = -1, []
                for _ in range(count):
                    rank += next(gaps) + 1
                    found.append(by_rank[rank])
                assert list(ids[at][:count]) == found
                roots = [(next(values) + 0.5) / 2 ** index["source"]["value_bits"] for _ in range(count)]
                weights = [root ** (2 * TEMPERATURES[-1] / temperature) for root in roots]
                tail = 1 / (1 + math.exp(-(tails[at][0] - 2048) / 128)) if tails[at][0] else 0.0
                p = [weight / sum(weights) * (1 - tail) for weight in weights]
                assert np.exp(logprobs[at][:count]) == pytest.approx(p, rel=1e-5)


def test_an_id_of_a_large_vocabulary_survives(tmp_path: Path) -> None:
    source = replace(SOURCE, vocabulary=151_665)
    logits = np.zeros((1, 151_665))
    logits[0, 151_664] = 20.0
    writer = Writer(tmp_path, source)
    row = _row(1, tokens=1)
    writer.write(0, [(row.key, _captured(logits, np.array([1]), source))])
    writer.finish(1)
    assert Reader(tmp_path).at_temperature(row, 1.0)[0].tolist() == [[151_664]]


def test_where_every_id_is_kept_there_is_no_tail(tmp_path: Path) -> None:
    source = replace(SOURCE, vocabulary=20, temperatures=(1.0,))
    writer = Writer(tmp_path, source)
    row = _row(1, tokens=1)
    logits = np.linspace(-2, 2, 20)[None]
    ids = np.arange(20)
    whole = Captured(np.array([20]), ids, quantise(np.exp(_log_softmax(logits))[0], source), np.array([[0]]))
    writer.write(0, [(row.key, whole)])
    writer.finish(1)
    assert np.exp(Reader(tmp_path).at_temperature(row, 1.0)[1]).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("tail", [0.0, 1e-9, 1e-6, 0.003, 0.5, 0.9, 1 - 1e-6, 1.0])
def test_a_tail_mass_is_kept_to_half_a_step_of_its_log_odds(tail: float) -> None:
    found = -np.expm1(log_kept(tail_codes(np.array([tail]))))[0]
    assert found == pytest.approx(tail, rel=0.004 * (1 - tail), abs=1.2e-7)
    assert (found == 0) == (tail == 0), "no tail and a tiny tail are two things"


def test_a_root_is_kept_to_half_a_step() -> None:
    source = replace(SOURCE, value_bits=6, min_probability=0.001)
    p = np.linspace(0.001, 1.0, 1000)
    found = np.exp(log_values(quantise(p, source), source) / 2)
    assert np.abs(found - np.sqrt(p)).max() <= 0.5 / 64 + 1e-12


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, _ = _cache(tmp_path / "one")
    two, _ = _cache(tmp_path / "two")
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert names == ["codebook.safetensors", "index.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_restarted_writer_keeps_whole_shards_of_the_same_rows_and_source_only(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    keys = [row.key for row in rows]
    writer = Writer(folder, SOURCE)
    assert writer.has(0, keys[:2])
    assert not writer.has(0, keys[1:3]), "other rows"
    assert not writer.has(2, keys[:2]), "never written"
    assert not Writer(folder, replace(SOURCE, teacher="0" * 64)).has(0, keys[:2]), "another revision of the teacher"
    (folder / "resume" / "shard-00001.safetensors").write_bytes(b"half a shard")
    assert writer.has(0, keys[:2])
    assert not writer.has(1, keys[2:])
    (folder / "resume" / "codebook.safetensors").write_bytes(b"another codebook")
    assert not writer.has(0, keys[:2])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"teacher": "0" * 64}, "captured with teacher sha256:aaaaaaaaaaaa, used with teacher sha256:000000000000"),
        ({"tokenizer": "0" * 64}, "captured with tokenizer sha256:bbbbbbbbbbbb"),
        ({"template": "0" * 64}, "captured with template sha256:cccccccccccc"),
        ({"vocabulary": 32_000}, "captured with vocabulary 300, used with vocabulary 32000"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_both_names(
    tmp_path: Path, wanted: dict[str, Any], message: str
) -> None:
    folder, _ = _cache(tmp_path / "cache")
    with pytest.raises(ArtifactError, match=message):
        Reader(folder).expect(**wanted)


def test_a_row_that_was_not_captured_is_named(tmp_path: Path) -> None:
    folder, _ = _cache(tmp_path / "cache")
    with pytest.raises(ArtifactError, match="row row-99 was not captured"):
        Reader(folder).read(_row(99))


def test_another_number_of_answer_tokens_is_refused(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text())
    index["rows"][rows[0].key][3] = 4
    _edit(folder, index)
    with pytest.raises(ArtifactError, match="wrong length: row row-0 has 5 answer tokens, 4 were captured"):
        Reader(folder).read(rows[0])


def test_a_temperature_that_was_not_captured_is_refused(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    with pytest.raises(ArtifactError, match=r"captured for temperatures \[1.0, 2.0, 4.0\], not 3.0"):
        Reader(folder).at_temperature(rows[0], 3.0)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    for name in ("shard-00001.safetensors", "codebook.safetensors"):
        path = folder / name
        path.unlink()  # the same file as in resume/ by another name
        content = bytearray((folder / "resume" / name).read_bytes())
        content[-9] ^= 1
        path.write_bytes(bytes(content))
        if name.startswith("shard"):
            reader = Reader(folder)
            reader.read(rows[0])
            with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors: damaged"):
                reader.read(rows[3])
    with pytest.raises(ArtifactError, match=r"codebook\.safetensors: damaged"):
        Reader(folder)


def test_bytes_that_another_program_packed_wrongly_are_refused(tmp_path: Path) -> None:
    """With checksums that fit: whatever the bits say, there is a row or an ArtifactError."""
    folder, rows = _cache(tmp_path / "cache")
    path = folder / "shard-00000.safetensors"
    good = load_file(path)["rows"]
    rng = np.random.default_rng(0)
    writer = Writer(folder, SOURCE)
    refused = 0
    for _ in range(200):
        bad = good.copy()
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.unlink()
        save_file({"rows": bad}, path)
        index = json.loads((folder / "index.json").read_text())
        save_file({"rows": bad}, writer.draft / path.name)
        index["shards"][0] = writer._put(path.name)
        _edit(folder, index)
        reader = Reader(folder)
        try:
            for row in rows[:2]:
                ids, logprobs = reader.at_temperature(row, 2.0)
                assert ids.max() < VOCABULARY
                assert np.isfinite(logprobs).any(-1).all()
        except ArtifactError:
            refused += 1
    assert refused > 20


def test_a_missing_or_cut_off_file_is_an_artifact_error(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    shard = folder / "shard-00000.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        Reader(folder).read(rows[0])
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        Reader(folder).read(rows[0])
    for text in ('{"format": "toolchain-logit-cache"}', "", "[]", "null", '{"format": '):
        (folder / "index.json").write_text(text)
        with pytest.raises(ArtifactError, match="not the index of a logit cache"):
            Reader(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": {"x": [1]}},
        {"codebook": {}},
        {"rows": []},
        {"source": {}},
        {"shards": [{}, {}]},
        {"rows": {"x": [0, -1, 1, 1]}},
    ],
)
def test_an_index_that_does_not_hold_together_is_an_artifact_error(tmp_path: Path, change: dict[str, Any]) -> None:
    folder, _ = _cache(tmp_path / "cache")
    _edit(folder, change)
    with pytest.raises(ArtifactError, match=r"not the index of a logit cache"):
        Reader(folder)


def test_a_place_outside_its_shard_is_an_artifact_error(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    for place in ([9, 0, 50, 5], [0, 10_000_000, 50, 5], [0, 0, 10_000_000, 5], [0, 0, 0, 5]):
        index = json.loads((folder / "index.json").read_text())
        index["rows"][rows[0].key] = place
        _edit(folder, index)
        with pytest.raises(ArtifactError, match="row row-0: its bytes do not decode"):
            Reader(folder).read(rows[0])


@pytest.mark.parametrize("change", [{"version": 1}, {"encoding": "csr-f16"}, {"format": "other"}])
def test_another_version_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder, _ = _cache(tmp_path / "cache")
    _edit(folder, change)
    with pytest.raises(ArtifactError, match="this program reads toolchain-logit-cache 2 ranked-golomb"):
        Reader(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("values", 1 << 10, "does not fit 10 bits"),
        ("values", -1, "does not fit 10 bits"),
        ("ids", VOCABULARY, "not below 300"),
        ("counts", 21, "counts and entries"),
        ("tails", 4096, "a tail mass does not fit"),
    ],
)
def test_content_that_is_no_distribution_is_not_written(tmp_path: Path, field: str, value: int, message: str) -> None:
    good = _captured(_logits(0), COUNTS)
    getattr(good, field)[2] = value
    with pytest.raises(ArtifactError, match=message):
        Writer(tmp_path, SOURCE).write(0, [(_row(0).key, good)])


def test_samples_come_back_as_shares_without_a_tail(tmp_path: Path) -> None:
    source = replace(SOURCE, selection="sample", samples=10, temperatures=(2.0,))
    row = _row(1, tokens=2)
    drawn = Captured(np.array([2, 1]), np.array([7, 299, 7]), np.array([2, 6, 9]), np.zeros((2, 1), np.int64))
    writer = Writer(tmp_path, source)
    writer.write(0, [(row.key, drawn)])
    writer.finish(1)
    ids, logprobs = Reader(tmp_path).at_temperature(row, 2.0)
    found = [dict(zip(ids[at].tolist(), np.exp(logprobs[at]).round(6).tolist(), strict=True)) for at in (0, 1)]
    assert found[0] == pytest.approx({7: 0.3, 299: 0.7})
    assert found[1][7] == pytest.approx(1.0)
    drawn.values[0] = 3
    with pytest.raises(ArtifactError, match="not 10 samples"):
        writer.write(0, [(row.key, drawn)])


def test_a_reader_goes_to_another_process_with_its_shards_closed(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    reader = Reader(folder)
    expected = reader.at_temperature(rows[0], 2.0)
    again = pickle.loads(pickle.dumps(reader)).at_temperature(rows[0], 2.0)
    assert all((one == other).all() for one, other in zip(again, expected, strict=True))


def test_all_rows_are_checked_before_the_first_is_used(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    Reader(folder).check(rows, 2.0)
    with pytest.raises(ArtifactError, match="was not captured"):
        Reader(folder).check([*rows, _row(99)], 2.0)
    with pytest.raises(ArtifactError, match="not 3"):
        Reader(folder).check(rows, 3.0)
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors"):
        Reader(folder).check(rows, 2.0)
