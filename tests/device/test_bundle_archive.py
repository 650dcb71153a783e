"""One archive of a bundle: the same bytes each time, unpacked whole on the device or not at all."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.device.bundles import edgectl, every_byte, toolchain
from tests.device.test_bundle_signature import allow, make_key
from toolchain.bundle import archive, seal
from toolchain.device import files, signature, tape, unpack
from toolchain.device.errors import DeviceError
from toolchain.errors import ArtifactError, HostError
from toolchain.reporter import Silent

pytestmark = pytest.mark.device


@pytest.fixture(scope="session")
def packed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "bundle.tar"
    archive.pack(built, out, report=Silent())
    return out


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "device"
    folder.mkdir()
    return folder


def unpacked(path: Path, into: Path, required: signature.Policy | None = None) -> Path:
    return unpack.run(path, into, required=required, say=lambda _: None)


def test_the_bundle_comes_out_as_it_went_in_and_works_there(
    built: Path, packed: Path, place: Path, tmp_path: Path
) -> None:
    done = edgectl(built, "unpack", str(packed), str(place))
    assert done.returncode == 0, done.stderr
    there = Path(done.stdout.strip())
    assert there == place / built.name
    assert every_byte(there) == every_byte(built)
    assert {path.stat().st_mode & 0o7777 for path in [there, *there.rglob("*")] if path.is_dir()} == {0o755}
    assert json.loads(edgectl(there, "verify", "--json").stdout)["ok"]
    assert list(place.iterdir()) == [there]
    done = edgectl(built, "unpack", "--json", str(packed), str(tmp_path))
    there = tmp_path / built.name
    expected = {"schema_version": 1, "bundle": files.open_bundle(there).id, "folder": str(there)}
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("umask", [0o077, 0o000, 0o027])
def test_modes_are_the_manifests_whatever_the_umask_is_there(
    built: Path, packed: Path, place: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        there = unpacked(packed, place)
    finally:
        os.umask(before)
    assert every_byte(there) == every_byte(built)
    assert {path.stat().st_mode & 0o7777 for path in [there, *there.rglob("*")] if path.is_dir()} == {0o755}


def test_tar_unpacks_it_without_our_code(packed: Path, built: Path, place: Path) -> None:
    subprocess.run(["tar", "-xf", packed, "-C", place], check=True)
    assert every_byte(place / built.name) == every_byte(built)
    with tarfile.open(packed) as tar:
        members = tar.getmembers()
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    assert [member.name.partition("/")[2] for member in members][:2] == [files.MANIFEST, files.SUMS]


def test_the_same_bytes_another_day_under_another_umask_locale_and_place(
    bundle: Path, packed: Path, tmp_path: Path
) -> None:
    for path in bundle.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    out = tmp_path / "again.tar"
    command = ["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, "-m", "toolchain.cli", "pack", str(bundle)]
    environment = {**os.environ, "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7"}
    argv = [*command, "--form", "archive", "--out", str(out)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert out.read_bytes() == packed.read_bytes()
    assert out.stat().st_mode & 0o7777 == 0o644
    assert done.stdout == f"sha256:{hashlib.sha256(packed.read_bytes()).hexdigest()}\n"


def test_headers_are_what_tarfile_reads_also_for_long_names_and_huge_files() -> None:
    long = "top/" + "x" * 90 + "/" + "y" * 99
    for name, size in (("a", 0), (long, 5), ("model/big.gguf", 9 << 30), ("b", 8**11 - 1)):
        info = tarfile.TarInfo.frombuf(tape.header(name, mode=0o755, size=size), "ascii", "strict")
        assert (info.name, info.size, info.mode, info.type) == (name, size, 0o755, tarfile.REGTYPE)
    with pytest.raises(DeviceError, match="too long a path"):
        tape.header("z" * 101, mode=0o644, size=0)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_packing_reads_each_byte_once(built: Path, packed: Path, tmp_path: Path) -> None:
    before = _bytes_read()
    archive.pack(built, tmp_path / "counted.tar", report=Silent())
    read = _bytes_read() - before
    size = packed.stat().st_size
    assert 0.9 * size < read < 1.2 * size


def test_unpacking_reads_each_byte_once(packed: Path, place: Path) -> None:
    before = _bytes_read()
    unpacked(packed, place)
    assert _bytes_read() - before < 1.1 * packed.stat().st_size


def refused(content: bytes, place: Path, says: str, required: signature.Policy | None = None) -> None:
    """It is refused with that message by unpack and by the host's verify alike, and nothing is left."""
    path = place.parent / "changed.tar"
    path.write_bytes(content)
    with pytest.raises(DeviceError) as caught:
        unpacked(path, place, required)
    assert says in caught.value.message, caught.value.message
    assert caught.value.hint
    assert list(place.iterdir()) == []
    signers = required.allowed_signers if required is not None else None
    with pytest.raises(ArtifactError) as seen:
        seal.check(path, allowed_signers=signers, signer=None, report=Silent())
    assert says in seen.value.message
    path.unlink()


def member_at(content: bytes, ending: str) -> tuple[int, int]:
    """Where the member whose name ends so begins, and where the next one does."""
    at = 0
    while at < len(content) and content[at : at + 512] != bytes(512):
        info = tarfile.TarInfo.frombuf(content[at : at + 512], "ascii", "strict")
        after = at + 512 + info.size + -info.size % 512
        if info.name.endswith(ending):
            return at, after
        at = after
    raise AssertionError(ending)


def link(name: str, to: str, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (lambda top: link(f"{top}/a", "/etc/passwd", tarfile.SYMTYPE), "holds a symbolic link"),
        (lambda top: link(f"{top}/a", f"{top}/edgectl", tarfile.LNKTYPE), "holds a hard link"),
        (lambda top: link(f"{top}/a", "", tarfile.CHRTYPE), "holds a device"),
        (lambda top: link(f"{top}/a", "", tarfile.FIFOTYPE), "holds a pipe"),
        (lambda top: link(f"{top}/a", "", tarfile.DIRTYPE), "holds a folder"),
        (lambda top: link(f"{top}/a", "", tarfile.GNUTYPE_LONGNAME), "an entry of type b'L'"),
        (lambda top: link(f"{top}/a", "", tarfile.XHDTYPE), "an entry of type b'x'"),
        (lambda top: tape.header("../evil", mode=0o644, size=0), "'../evil', which its manifest does not list"),
        (lambda top: tape.header(f"{top}/../evil", mode=0o644, size=0), "which its manifest does not list"),
        (lambda top: tape.header("/etc/cron.d/evil", mode=0o644, size=0), "which its manifest does not list"),
        (lambda top: tape.header(f"{top}/EDGECTL", mode=0o755, size=0), "which its manifest does not list"),
        (lambda top: tape.header(f"{top}/edgectl", mode=0o755, size=0), "twice, or out of order"),
        (lambda top: tape.header(f"{top}/{files.SIGNATURE}", mode=0o644, size=0), "does not list"),
    ],
)
@pytest.mark.parametrize("ending", ["/Modelfile", ".gguf"])
def test_an_entry_that_is_not_the_bundles_is_refused(
    packed: Path, built: Path, place: Path, entry: Callable[[str], bytes], says: str, ending: str
) -> None:
    content = packed.read_bytes()
    at, _ = member_at(content, ending)
    refused(content[:at] + entry(built.name) + content[at:], place, says)


def test_what_follows_the_last_file_is_refused(packed: Path, built: Path, place: Path) -> None:
    content = packed.read_bytes()
    more = content[: -len(tape.END)] + tape.header(f"{built.name}/more", mode=0o644, size=0) + tape.END
    refused(more, place, "holds more than its manifest lists")
    refused(content + b"x", place, "goes on after its end")


def test_another_size_or_mode_than_the_manifests_is_refused(packed: Path, built: Path, place: Path) -> None:
    content = packed.read_bytes()
    at, _ = member_at(content, "/Modelfile")
    name = f"{built.name}/Modelfile"
    size = tarfile.TarInfo.frombuf(content[at : at + 512], "ascii", "strict").size
    longer = content[:at] + tape.header(name, mode=0o644, size=size + 10_000_000_000) + content[at + 512 :]
    refused(longer, place, f"Modelfile: changed: {size + 10_000_000_000} bytes, the manifest says {size}")
    rights = content[:at] + tape.header(name, mode=0o4755, size=size) + content[at + 512 :]
    refused(rights, place, "its header is not as this toolchain writes it")


def test_what_is_no_archive_is_refused(packed: Path, place: Path) -> None:
    import gzip

    refused(b"", place, "is cut short")
    refused(b"hello" * 1000, place, "is no archive, or is damaged")
    refused(bytes(4096), place, "ends before all its files have come")
    refused(gzip.compress(packed.read_bytes(), 1), place, "is compressed with gzip")
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("readme"))
    refused(other.getvalue(), place, "begins with 'readme'")


def test_an_archive_that_is_cut_short_anywhere_leaves_nothing(packed: Path, place: Path) -> None:
    content = packed.read_bytes()
    ends = [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1, len(content) - 512]
    for end in ends:
        path = place.parent / "cut.tar"
        path.write_bytes(content[:end])
        with pytest.raises(DeviceError, match="cut short"):
            unpacked(path, place)
        assert list(place.iterdir()) == []


def test_a_manifest_that_names_a_path_outside_is_refused_before_anything_is_written(
    bundle: Path, place: Path, tmp_path: Path
) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    content["files"]["../../evil"] = content["files"]["Modelfile"]
    content["bundle_id"] = files.bundle_id(content)
    manifest = json.dumps(content).encode()
    sums = files.sums_text(content, hashlib.sha256(manifest).hexdigest()).encode()
    out = b""
    for name, data in ((files.MANIFEST, manifest), (files.SUMS, sums)):
        out += tape.header(f"{bundle.name}/{name}", mode=0o644, size=len(data)) + data + tape.padding(len(data))
    refused(out + tape.header("../../evil", mode=0o644, size=0) + tape.END, place, "not a plain path inside the bundle")


def test_one_flipped_byte_anywhere_is_noticed(bundle: Path, place: Path, tmp_path: Path) -> None:
    """In every header, in every file and in the space between them, of a signed archive."""
    key = make_key(tmp_path / "key")
    required = signature.Policy(allow(tmp_path / "names", builder=key), None)
    seal.sign(bundle, key=key)
    packed = tmp_path / "signed.tar"
    archive.pack(bundle, packed, report=Silent())
    assert unpack.check(packed, required=required).verdict.ok
    content = packed.read_bytes()
    changed = tmp_path / "changed.tar"
    positions = [*range(0, len(content), max(1, len(content) // 300)), *range(0, 512, 7), len(content) - 1]
    at = 0
    while content[at : at + 512] != bytes(512):
        info = tarfile.TarInfo.frombuf(content[at : at + 512], "ascii", "strict")
        positions += [at, at + 105, at + 130, at + 150, at + 156, at + 300, at + 511, at + 512]
        at += 512 + info.size + -info.size % 512
        positions.append(at - 1)
    assert len(positions) > 500
    for position in positions:
        copy = bytearray(content)
        copy[position] ^= 1 << (position % 8)
        changed.write_bytes(bytes(copy))
        with pytest.raises(DeviceError):
            unpack.check(changed, required=required)


def test_a_signature_is_asked_for_before_the_rest_is_looked_at(
    bundle: Path, packed: Path, place: Path, tmp_path: Path
) -> None:
    key, stranger = make_key(tmp_path / "key"), make_key(tmp_path / "stranger")
    names = allow(tmp_path / "names", builder=key)
    required = signature.Policy(names, None)
    refused(packed.read_bytes(), place, "signature: unsigned", required)
    # Cut after the head: the signature is what is complained of.
    seal.sign(bundle, key=stranger)
    archive.pack(bundle, tmp_path / "strange.tar", report=Silent())
    refused((tmp_path / "strange.tar").read_bytes()[:40_000], place, "signature: unknown signer", required)
    seal.sign(bundle, key=key)
    archive.pack(bundle, tmp_path / "good.tar", report=Silent())
    options = ["--allowed-signers", str(names)]
    assert edgectl(bundle, "unpack", str(tmp_path / "good.tar"), str(place), *options).returncode == 0
    assert (place / bundle.name / files.SIGNATURE).is_file()
    assert toolchain("verify", str(tmp_path / "good.tar"), *options).returncode == 0
    assert toolchain("verify", str(tmp_path / "strange.tar"), *options).returncode == 1


def test_a_bundle_that_is_there_already_is_left_as_it_is(packed: Path, built: Path, place: Path) -> None:
    there = unpacked(packed, place)
    (there / "Modelfile").write_text("mine\n")
    with pytest.raises(DeviceError, match="is there already"):
        unpacked(packed, place)
    assert (there / "Modelfile").read_text() == "mine\n"


def test_what_a_killed_one_left_is_cleared_and_a_running_one_is_not_disturbed(
    packed: Path, built: Path, place: Path
) -> None:
    left = place / f".{built.name}.unpacking"
    (left / "model").mkdir(parents=True)
    (left / "model" / "half").write_bytes(b"x")
    holder = os.open(left, os.O_RDONLY)
    import fcntl

    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(DeviceError, match=r"is being unpacked into .* by another process"):
        unpacked(packed, place)
    assert (left / "model" / "half").exists()
    os.close(holder)
    assert every_byte(unpacked(packed, place)) == every_byte(built)
    assert not left.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of one MiB, less than the model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    return disk


@pytest.fixture(autouse=True)
def _unmounted(tmp_path: Path) -> object:
    yield
    disk = tmp_path / "disk"
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_too_small_is_said_before_and_one_that_fills_up_keeps_nothing_half(
    built: Path, packed: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = edgectl(built, "unpack", str(packed), str(small_disk))
    assert done.returncode == 1
    assert "MiB free" in done.stderr
    assert "nothing was unpacked" in done.stderr
    with pytest.raises(HostError, match="MiB free"):
        archive.pack(built, small_disk / "out.tar", report=Silent())
    # As if others had filled it in the meantime.
    monkeypatch.setattr("toolchain.device.place.check_room", lambda head, into: None)
    with pytest.raises(DeviceError, match=r"no space left .* nothing was unpacked"):
        unpacked(packed, small_disk)
    monkeypatch.setattr(archive, "require_free", lambda folder, size, what: None)
    with pytest.raises(HostError, match="no space left, nothing was written"):
        archive.pack(built, small_disk / "out.tar", report=Silent())
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "link"])
def test_a_bundle_that_is_not_as_built_is_not_packed(bundle: Path, tmp_path: Path, damage: str) -> None:
    model = next(bundle.glob("model/*.gguf"))
    if damage == "changed":
        content = bytearray(model.read_bytes())
        content[-1] ^= 1
        model.write_bytes(bytes(content))
    elif damage == "missing":
        model.unlink()
    elif damage == "extra":
        (bundle / "more").write_text("x")
    else:
        model.rename(tmp_path / "elsewhere")
        model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"bytes have changed|missing|extra|is a link"):
        archive.pack(bundle, tmp_path / "out.tar", report=Silent())
    assert not list(tmp_path.glob("*out.tar*"))


def test_a_stale_signature_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    seal.sign(bundle, key=key)
    content = (bundle / files.SIGNATURE).read_text().replace("A", "B", 1)
    (bundle / files.SIGNATURE).write_text(content)
    with pytest.raises(ArtifactError, match="signature: "):
        archive.pack(bundle, tmp_path / "out.tar", report=Silent())


def test_a_file_that_is_there_is_kept_without_force(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tar"
    out.write_text("precious")
    done = toolchain("pack", str(built), "--form", "archive", "--out", str(out))
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert out.read_text() == "precious"
    assert toolchain("pack", str(built), "--form", "archive", "--out", str(out), "--force").returncode == 0
    assert unpack.check(out, required=None).top == built.name
    inside = toolchain("pack", str(built), "--form", "archive", "--out", str(built / "x.tar"))
    assert inside.returncode == 1
    assert "inside the bundle" in inside.stderr


def test_wrong_calls_of_unpack_say_what_is_wrong(built: Path, packed: Path, place: Path) -> None:
    for arguments, says in (
        ((str(place / "none.tar"), str(place)), "none.tar: No such file"),
        ((str(packed), str(place / "none")), "none: no such folder"),
    ):
        done = edgectl(built, "unpack", *arguments)
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr
