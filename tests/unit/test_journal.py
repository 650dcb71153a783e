"""Results that survive a kill."""

from pathlib import Path

import pytest

from toolchain.errors import ArtifactError
from toolchain.journal import Journal


def test_what_was_filed_is_there_again_and_a_cut_last_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "resume" / "search.jsonl"
    with Journal(path) as journal:
        assert journal.add("a", {"x": 1.5}) == {"x": 1.5}
        journal.add("b", [2])
        assert "a" in journal
        assert "c" not in journal
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with Journal(path) as journal:
        assert journal["a"] == {"x": 1.5}
        assert "b" not in journal
        journal.add("b", [2])
    assert path.read_bytes() == whole


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "resume" / "search.jsonl"
    with Journal(path) as journal:
        journal.add("a", 1)
    path.write_bytes(b"\xff\n" + path.read_bytes())
    with pytest.raises(ArtifactError, match="line 1 is damaged"):
        Journal(path)
