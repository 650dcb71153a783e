"""The cache on disk: what goes in comes out, and nothing wrong comes out silently."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.data.rows import Message, Row
from toolchain.errors import ArtifactError
from toolchain.teacher.logit_cache import Captured, Reader, Source, Writer, compress, id_type

TEMPERATURES = (1.0, 2.0, 4.0)
VOCABULARY = 300
SOURCE = Source("a" * 64, "b" * 64, "c" * 64, VOCABULARY, TEMPERATURES, 20, 0.9)


def _row(number: int, tokens: int = 5) -> Row:
    return Row(f"row-{number}", (Message("user", "q"),), "a", (1, 2, number), tuple(range(3, 3 + tokens)), "stop")


def _log_softmax(logits: Any) -> Any:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def _captured(logits: Any, counts: Any, vocabulary: int = VOCABULARY) -> Captured:
    ids = np.argsort(-logits, axis=-1)[:, : counts.max()]
    kept = np.arange(ids.shape[1]) < counts[:, None]
    mass = {}
    for temperature in TEMPERATURES:
        p = np.exp(np.take_along_axis(_log_softmax(logits / temperature), ids, -1))
        mass[temperature] = np.log((p * kept).sum(-1))
    return compress(ids, np.take_along_axis(_log_softmax(logits), ids, -1), counts, mass, vocabulary=vocabulary)


def _logits(seed: int, tokens: int = 5) -> Any:
    return np.random.default_rng(seed).normal(scale=3.0, size=(tokens, VOCABULARY))


COUNTS = np.array([1, 20, 7, 3, 20])


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
    return out, rows


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_and_tail_mass_come_back_at_every_temperature(tmp_path: Path, temperature: float) -> None:
    folder, rows = _cache(tmp_path / "cache")
    reader = Reader(folder)
    assert len(reader) == 4
    for row in reversed(rows):
        ids, logprobs = reader.at_temperature(row, temperature)
        expected = _log_softmax(_logits(row.prompt_ids[2]) / temperature)
        filled = np.isfinite(logprobs)
        assert (filled.sum(-1) == COUNTS).all()
        for at in range(5):
            found = ids[at][filled[at]]
            assert list(found) == list(np.argsort(-expected[at])[: COUNTS[at]])
            assert np.abs(logprobs[at][filled[at]] - expected[at][found]).max() < 4e-3
            kept = np.exp(logprobs[at][filled[at]].astype(np.float64)).sum()
            assert kept == pytest.approx(np.exp(expected[at][found]).sum(), abs=1e-6), "the tail mass is exact"


def test_ids_take_two_bytes_up_to_65536_and_four_above() -> None:
    assert id_type(65_536) is np.uint16
    assert id_type(65_537) is np.uint32


def test_an_id_above_65535_survives(tmp_path: Path) -> None:
    wide = 151_665
    logits = np.zeros((1, wide))
    logits[0, wide - 1] = 20.0
    source = Source("a" * 64, "b" * 64, "c" * 64, wide, TEMPERATURES, 20, 0.9)
    writer = Writer(tmp_path, source)
    row = _row(1, tokens=1)
    writer.write(0, [(row.key, _captured(logits, np.array([1]), wide))])
    writer.finish(1)
    assert Reader(tmp_path).at_temperature(row, 1.0)[0].tolist() == [[wide - 1]]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, _ = _cache(tmp_path / "one")
    two, _ = _cache(tmp_path / "two")
    names = sorted(path.name for path in one.iterdir() if path.is_file())
    assert names == ["index.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_restarted_writer_keeps_whole_shards_of_the_same_rows_only(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    keys = [row.key for row in rows]
    writer = Writer(folder, SOURCE)
    assert writer.has(0, keys[:2])
    assert not writer.has(0, keys[1:3]), "other rows"
    assert not writer.has(2, keys[:2]), "never written"
    (folder / "resume" / "shard-00001.safetensors").write_bytes(b"half a shard")
    assert not writer.has(1, keys[2:])


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
    index["rows"][rows[0].key][2] = 4
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="row row-0 has 5 answer tokens, 4 were captured"):
        Reader(folder).read(rows[0])


def test_a_temperature_that_was_not_captured_is_refused(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    with pytest.raises(ArtifactError, match=r"captured for temperatures \[1.0, 2.0, 4.0\], not 3.0"):
        Reader(folder).at_temperature(rows[0], 3.0)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    path = folder / "shard-00001.safetensors"
    (folder / "resume" / path.name).unlink()  # the same file by another name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    reader = Reader(folder)
    reader.read(rows[0])
    with pytest.raises(ArtifactError, match=r"shard-00001\.safetensors: damaged"):
        reader.read(rows[3])


def test_a_missing_shard_or_index_is_an_artifact_error(tmp_path: Path) -> None:
    folder, rows = _cache(tmp_path / "cache")
    (folder / "shard-00000.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        Reader(folder).read(rows[0])
    (folder / "index.json").write_text('{"format": "toolchain-logit-cache"}')
    with pytest.raises(ArtifactError, match="not the index of a logit cache"):
        Reader(folder)


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder, _ = _cache(tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(
        ArtifactError, match="logit-cache 2 csr-f16, this program reads toolchain-logit-cache 1 csr-f16"
    ):
        Reader(folder)


@pytest.mark.parametrize("field", ["logprobs", "normalisers"])
def test_a_value_that_is_not_finite_is_not_written(tmp_path: Path, field: str) -> None:
    good = _captured(_logits(0), COUNTS)
    getattr(good, field)[2] = np.nan
    with pytest.raises(ArtifactError, match="not finite"):
        Writer(tmp_path, SOURCE).write(0, [(_row(0).key, good)])
