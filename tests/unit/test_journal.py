"""Results that survive a kill."""

from pathlib import Path

import pytest

from toolchain.journal import Journal


def test_what_was_filed_is_not_computed_again_and_a_cut_last_line_is(tmp_path: Path) -> None:
    path = tmp_path / "resume" / "search.jsonl"
    with Journal(path) as journal:
        assert journal.once("a", lambda: {"x": 1.5}) == {"x": 1.5}
        journal.once("b", lambda: [2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with Journal(path) as journal:
        assert journal.once("a", pytest.fail) == {"x": 1.5}
        assert journal.once("b", lambda: [2]) == [2]
    assert path.read_bytes() == whole


def test_from_a_damaged_line_on_everything_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "resume" / "search.jsonl"
    with Journal(path) as journal:
        journal.once("a", lambda: 1)
        journal.once("b", lambda: 2)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff\n" + second)
    with Journal(path) as journal:
        assert journal.once("a", pytest.fail) == 1
        assert journal.once("b", lambda: 3) == 3
    assert path.read_bytes() == first + second.replace(b"2", b"3")
