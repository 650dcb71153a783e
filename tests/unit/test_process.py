"""External programs: a full disk is told as that, and whose it is."""

from pathlib import Path

import pytest

from toolchain import process
from toolchain.errors import ExternalToolError, HostError

_FULL = "echo 'write failed: No space left on device'; echo and more"


def test_a_program_that_fails_for_want_of_room_says_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="sh: no space left on the disk"):
        process.run(["sh", "-c", f"{_FULL}; exit 1"], log=tmp_path / "log")


def test_the_full_disk_of_another_machine_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ExternalToolError, match="sh exited with 11: and more"):
        process.run(["sh", "-c", f"{_FULL}; exit 11"], log=tmp_path / "log", elsewhere=True)


def test_a_program_that_ends_well_had_room(tmp_path: Path) -> None:
    process.run(["sh", "-c", _FULL], log=tmp_path / "log")
    assert "No space left on device" in (tmp_path / "log").read_text()


def test_a_variable_that_is_left_out_is_not_there_even_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEPT", "LEFT_OUT", "CHANGED"):
        monkeypatch.setenv(name, "here")
    out = tmp_path / "out"
    show = 'echo "${KEPT-none} ${LEFT_OUT-none} ${CHANGED-none} ${ADDED-none} ${BOTH-none}"'
    env = {"CHANGED": "now", "ADDED": "", "BOTH": "x"}
    process.run(["sh", "-c", show], log=tmp_path / "log", env=env, without=["LEFT_OUT", "BOTH"], stdout=out)
    assert out.read_text() == "here none now  none\n"
