"""Making a base where it cannot be made."""

from pathlib import Path
from typing import Any

import pytest

from toolchain.bundle import minimal_base
from toolchain.errors import ExternalToolError, HostError, RecipeError
from toolchain.gguf import cuda_toolkit
from toolchain.reporter import Silent
from toolchain.resources import versions
from toolchain.target import read_target


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


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("there.tar", "there.tar is there already"),
        ("none/base.tar", "no such folder"),
        ("/proc/base.tar", "/proc/base.tar was not written"),
    ],
)
def test_where_it_cannot_be_written_is_told_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str, says: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("toolchain.process.run", lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr("toolchain.bundle.archive.require_free", lambda *_: None)
    (tmp_path / "there.tar").write_text("kept")
    with pytest.raises(HostError, match=says):
        minimal_base.make(tmp_path / out, arch="x86_64", report=Silent())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("arch", "libraries"),
    [
        ("aarch64", ("libcudart.so.12", "libcublas.so.12")),
        ("x86_64", ("libcudart.so.13",)),
        ("aarch64", ("libnpu.so",)),
    ],
)
def test_libraries_that_cannot_be_had_are_named_with_where_they_are(
    arch: str, libraries: tuple[str, ...], tmp_path: Path
) -> None:
    profile = tmp_path / "board.toml"
    for image, told in (
        ("", "image.base"),
        ('[image]\nbase = "example.org/npu:1"\n', "BASE=example.org/npu:1 -t base"),
    ):
        profile.write_text(
            f'name = "board"\ndescription = "made up"\narch = "{arch}"\n{image}[runtime]\nbackend = "CPU"\n'
            f'glibc_floor = "2.35"\ndevice_libraries = {list(libraries)}\n[runtime.cmake]\n'
        )
        target = read_target(str(profile))
        with pytest.raises(HostError, match=libraries[0]) as caught:
            minimal_base.make(tmp_path / "base.tar", arch=arch, target=target, report=Silent())
        assert told in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == [profile]


def test_a_jetson_whose_libraries_are_no_packages_is_told_which_image_has_them(tmp_path: Path) -> None:
    hint = minimal_base.how(read_target("jetson-orin"), out=tmp_path / "base.tar")
    assert f"--target device --platform linux/arm64 --build-arg BASE={versions()['images']['jetson_orin']} " in hint
    assert hint.endswith(f"docker save -o {tmp_path}/base.tar base")


@pytest.mark.parametrize("name", ["x86-cpu", "rpi5", "jetson-orin-jp7"])
def test_a_base_that_can_be_made_here_is(name: str) -> None:
    assert minimal_base.how(read_target(name), out=Path("base.tar")).startswith("toolchain base --")


def test_an_image_that_is_misspelt_is_refused_when_the_profile_is_read(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(
        'name = "board"\ndescription = "made up"\narch = "aarch64"\n[image]\nbase = "jetson_orn"\n'
        '[runtime]\nbackend = "CPU"\nglibc_floor = "2.35"\n[runtime.cmake]\n'
    )
    with pytest.raises(RecipeError, match=r"base names 'jetson_orn': known are .*jetson_orin, .* or give a reference"):
        read_target(str(tmp_path / "board.toml"))


def test_a_jetson_with_cuda_13_gets_what_its_profile_says_that_it_has() -> None:
    wanted = read_target("jetson-orin-jp7").runtime.device_libraries
    assert wanted
    assert cuda_toolkit.device_libraries() > set(wanted)
