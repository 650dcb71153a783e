"""Making a base where it cannot be made."""

from pathlib import Path
from typing import Any

import pytest

from toolchain.bundle import minimal_base
from toolchain.errors import ExternalToolError, HostError
from toolchain.reporter import Silent


def test_a_machine_that_is_not_debian_is_told_what_to_give_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(HostError, match="no apt-get on this machine") as caught:
        minimal_base.make(tmp_path / "base.tar", arch="x86_64", report=Silent())
    assert caught.value.hint is not None
    assert "docker save" in caught.value.hint


def test_packages_that_cannot_be_had_leave_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")

    def fail(argv: list[str], **options: Any) -> None:
        raise ExternalToolError("sh exited with 100: E: Unable to locate package", hint=options["hint"])

    monkeypatch.setattr("toolchain.process.run", fail)
    with pytest.raises(ExternalToolError) as caught:
        minimal_base.make(tmp_path / "base.tar", arch="aarch64", report=Silent())
    assert "apt-get update" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
