"""A bundle as an image, made without a container engine: what skopeo reads, the same bytes each time."""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles, tiny_chat
from tests.device.bundles import every_byte, toolchain
from toolchain.bundle import forms, image
from toolchain.bundle.base_image import GZIP_LAYER
from toolchain.device import files
from toolchain.errors import ArtifactError, HostError
from toolchain.reporter import Silent
from toolchain.target import read_target

pytestmark = pytest.mark.device
LOADER = {
    "amd64": "lib64/ld-linux-x86-64.so.2",
    "arm64": "lib/ld-linux-aarch64.so.1",
    "riscv64": "lib/ld-linux-riscv64-lp64d.so.1",
}


def tar_of(*names: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            content = name.encode()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def layers_for(arch: str = "amd64", python: str | None = "3.11") -> list[bytes]:
    """What a base must have, by name: the images here are inspected, not run."""
    found = [LOADER[arch]]
    if python is not None:
        found += ["usr/bin/python3", f"usr/bin/python{python}", f"usr/lib/python{python}/http/client.py"]
    return [tar_of("etc/os-release"), tar_of(*found)]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def config_of(layers: list[bytes], arch: str) -> bytes:
    config = {
        "os": "linux",
        "architecture": arch,
        "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["sh"], "User": "root", "Labels": {"base": "yes"}},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer)}" for layer in layers]},
        "history": [{"created_by": "one"}, {"created_by": "ENV", "empty_layer": True}, {"created_by": "two"}],
    }
    return json.dumps(config).encode()


def write_tar(path: Path, content: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def saved(path: Path, layers: list[bytes] | None = None, arch: str = "amd64") -> Path:
    """As `docker save` before version 25 writes it."""
    layers = layers_for(arch) if layers is None else layers
    config = config_of(layers, arch)
    content = {f"{sha256(layer)}/layer.tar": layer for layer in layers}
    listed = [{"Config": f"{sha256(config)}.json", "RepoTags": ["base:1"], "Layers": list(content)}]
    content[f"{sha256(config)}.json"] = config
    return write_tar(path, {**content, "manifest.json": json.dumps(listed).encode()})


def layout(path: Path, arches: tuple[str, ...] = ("amd64",), layer_type: str = GZIP_LAYER) -> Path:
    """An OCI layout in a folder, with compressed layers; of several platforms an index in the index."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes, media_type: str) -> dict[str, Any]:
        (blobs / sha256(content)).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{sha256(content)}", "size": len(content)}

    manifests = []
    for arch in arches:
        layers = layers_for(arch)
        manifest = {
            "schemaVersion": 2,
            "mediaType": image.MANIFEST_TYPE,
            "config": put(config_of(layers, arch), image.CONFIG_TYPE),
            "layers": [put(gzip.compress(layer, mtime=0), layer_type) for layer in layers],
        }
        entry = put(json.dumps(manifest).encode(), image.MANIFEST_TYPE)
        manifests.append({**entry, "platform": {"os": "linux", "architecture": arch}})
    index = {"schemaVersion": 2, "mediaType": image.INDEX_TYPE, "manifests": manifests}
    if len(arches) > 1:
        index = {**index, "manifests": [put(json.dumps(index).encode(), image.INDEX_TYPE)]}
    (path / "index.json").write_text(json.dumps(index))
    (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return path


def pack(bundle: Path, base: Path, out: Path) -> dict[str, Any]:
    return image.pack(bundle, out, base=base, report=Silent())


def read(out: Path) -> dict[str, bytes]:
    with tarfile.open(out, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]


def config_in(content: dict[str, bytes]) -> dict[str, Any]:
    manifest = manifest_in(content)
    config: dict[str, Any] = json.loads(content[blob(manifest["config"])])
    return config


def manifest_in(content: dict[str, bytes]) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(content[blob(json.loads(content["index.json"])["manifests"][0])])
    return manifest


def blob(descriptor: dict[str, Any]) -> str:
    return "blobs/" + str(descriptor["digest"]).replace(":", "/")


@pytest.fixture(params=["saved", "layout", "layout in a tar", "one of two platforms"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "saved":
        return saved(tmp_path / "base.tar")
    if request.param == "layout":
        return layout(tmp_path / "base")
    if request.param == "one of two platforms":
        return layout(tmp_path / "base", ("arm64", "amd64"))
    folder = layout(tmp_path / "base")
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return write_tar(tmp_path / "base.tar", content)


def test_every_blob_is_what_its_name_says_and_every_layer_what_the_config_says(
    built: Path, base: Path, tmp_path: Path
) -> None:
    facts = pack(built, base, tmp_path / "image.tar")
    content = read(tmp_path / "image.tar")
    blobs = {name: data for name, data in content.items() if name.startswith("blobs/")}
    assert {name: f"blobs/sha256/{sha256(data)}" for name, data in blobs.items()} == {name: name for name in blobs}
    manifest, config = manifest_in(content), config_in(content)
    index = json.loads(content["index.json"])
    assert index["manifests"][0]["digest"] == f"sha256:{facts['digest']}"
    assert len(manifest["layers"]) == 5
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        data = content[blob(layer)]
        assert layer["size"] == len(data)
        plain = gzip.decompress(data) if layer["mediaType"].endswith("gzip") else data
        assert diff_id == f"sha256:{sha256(plain)}"
    for_docker = json.loads(content["manifest.json"])[0]
    assert for_docker["Layers"] == [blob(layer) for layer in manifest["layers"]]
    assert for_docker["RepoTags"] == ["tiny-x86-cpu:1.0"]
    assert sum(not entry.get("empty_layer", False) for entry in config["history"]) == 5


def test_skopeo_takes_it_as_an_oci_archive_and_as_dockers(built: Path, base: Path, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("no skopeo: apt-get install skopeo")
    out = tmp_path / "image.tar"
    facts = pack(built, base, out)

    def skopeo(*arguments: str) -> str:
        return subprocess.run(["skopeo", *arguments], check=True, capture_output=True, text=True).stdout

    raw = skopeo("inspect", "--raw", f"oci-archive:{out}")
    assert sha256(raw.encode()) == facts["digest"]
    seen = json.loads(skopeo("inspect", "--config", f"docker-archive:{out}"))
    assert seen["config"]["User"] == image.USER
    # A copy reads every blob and checks every digest; the digest that is signed stays.
    skopeo("--insecure-policy", "copy", "--preserve-digests", f"oci-archive:{out}", f"dir:{tmp_path / 'copied'}")
    assert sha256((tmp_path / "copied" / "manifest.json").read_bytes()) == facts["digest"]
    skopeo("--insecure-policy", "copy", f"docker-archive:{out}", f"dir:{tmp_path / 'dockers'}")


def test_the_layers_put_together_are_the_bundle(built: Path, base: Path, tmp_path: Path) -> None:
    pack(built, base, tmp_path / "image.tar")
    content = read(tmp_path / "image.tar")
    root = tmp_path / "root"
    for layer in manifest_in(content)["layers"][-3:]:
        with tarfile.open(fileobj=io.BytesIO(content[blob(layer)])) as tar:
            assert {(member.uid, member.gid, member.mtime) for member in tar.getmembers()} == {(0, 0, 0)}
            assert all(member.isreg() or (member.isdir() and member.mode == 0o755) for member in tar.getmembers())
            for member in tar.getmembers():
                tar.extract(member, root, filter="data")
    assert every_byte(root / "bundle") == every_byte(built)
    assert files.problems(files.open_bundle(root / "bundle")) == []


def test_it_starts_the_server_as_nobody_and_is_asked_for_its_health(built: Path, tmp_path: Path) -> None:
    pack(built, saved(tmp_path / "base.tar"), tmp_path / "image.tar")
    found = config_in(read(tmp_path / "image.tar"))
    assert (found["os"], found["architecture"]) == ("linux", "amd64")
    config = found["config"]
    assert config["Entrypoint"] == ["python3", "-I", "-S", "/bundle/edgectl", "serve"]
    assert config["User"] == "65532:65532"
    assert config["ExposedPorts"] == {"8080/tcp": {}}
    assert config["Healthcheck"]["StartPeriod"] == 120_000_000_000
    assert config["StopSignal"] == "SIGTERM"
    assert config["Env"] == ["PATH=/usr/bin:/bin"]
    labels = config["Labels"]
    assert labels["base"] == "yes"
    assert labels["org.opencontainers.image.version"] == "1.0"
    assert labels["toolchain.bundle.id"] == files.open_bundle(built).id
    # What it is started with is understood by edgectl: it stops at the key that is not there, and at nothing before.
    done = bundles.edgectl(built, "serve", *config["Cmd"])
    assert done.returncode == 2
    assert "--api-key-file /run/secrets/api_key: cannot be read" in done.stderr


def test_another_model_changes_neither_base_nor_runtime_layer(
    built: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other_place = tmp_path_factory.mktemp("other")
    model = tiny_chat.write_gguf(other_place / "model.gguf", eos="<|other|>")
    other = bundles.maker(bundles.install(other_place / "llama.cpp"), model, other_place)()
    base = saved(tmp_path / "base.tar")
    first, second = pack(built, base, tmp_path / "a.tar"), pack(other, base, tmp_path / "b.tar")
    assert first["layers"]["runtime"] == second["layers"]["runtime"]
    assert first["layers"]["model"] != second["layers"]["model"]
    layers = [manifest_in(read(tmp_path / name))["layers"] for name in ("a.tar", "b.tar")]
    assert layers[0][:3] == layers[1][:3]
    small = first["layers"]["description"]["bytes"]
    assert small < 200_000


def test_the_same_bytes_another_day_under_another_umask_and_locale(bundle: Path, base: Path, tmp_path: Path) -> None:
    pack(bundle, base, tmp_path / "first.tar")
    for path in bundle.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    out = tmp_path / "second.tar"
    call = [sys.executable, "-m", "toolchain.cli", "pack", str(bundle), "--form", "image", "--base", str(base)]
    environment = {**os.environ, "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7"}
    argv = ["sh", "-c", 'umask 077; exec "$@"', "sh", *call, "--out", str(out)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert out.read_bytes() == (tmp_path / "first.tar").read_bytes()
    assert done.stdout.startswith("sha256:")


def test_the_bundle_is_read_once(built: Path, tmp_path: Path) -> None:
    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))

    base = saved(tmp_path / "base.tar")
    size = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
    before = bytes_read()
    pack(built, base, tmp_path / "image.tar")
    assert 0.9 * size < bytes_read() - before < 1.2 * size


def test_a_signature_travels_with_the_description(bundle: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    assert toolchain("sign", str(bundle), "--key", str(tmp_path / "key")).returncode == 0
    pack(bundle, saved(tmp_path / "base.tar"), tmp_path / "image.tar")
    content = read(tmp_path / "image.tar")
    with tarfile.open(fileobj=io.BytesIO(content[blob(manifest_in(content)["layers"][-1])])) as tar:
        assert f"bundle/{files.SIGNATURE}" in tar.getnames()


def test_a_base_for_another_processor_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="is for linux/arm64, the bundle for linux/amd64"):
        pack(built, saved(tmp_path / "base.tar", arch="arm64"), tmp_path / "image.tar")
    folder = layout(tmp_path / "base", ("arm64", "riscv64"))
    with pytest.raises(HostError, match=r"0 images for linux/amd64, not one \(there are: linux/arm64, linux/riscv64\)"):
        pack(built, folder, tmp_path / "image.tar")


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([tar_of("lib/ld-musl-x86_64.so.1", "usr/lib/python3.12/http/client.py")], "no glibc for x86_64 in it"),
        (layers_for(python=None), "no Python with its standard library in it, edgectl needs 3.10"),
        (layers_for(python="3.9"), "Python 3.9 in it, edgectl needs 3.10 or newer"),
        ([tar_of(LOADER["amd64"], "usr/bin/python3.11")], "no Python with its standard library"),
        ([tar_of(LOADER["amd64"], "usr/lib/python3.11/http/client.py")], "no program python3 in it"),
        ([*layers_for(), tar_of("usr/bin/.wh.python3")], "no program python3 in it"),
        ([*layers_for(), tar_of("./usr/lib/.wh.python3.11")], "no Python with its standard library"),
        ([*layers_for(), tar_of("usr/lib/python3.11/http/.wh..wh..opq")], "no Python with its standard library"),
        ([*layers_for(), tar_of(".wh..wh..opq")], "no glibc for x86_64 in it"),
    ],
)
def test_a_base_on_which_it_could_not_run_is_refused(
    built: Path, tmp_path: Path, layers: list[bytes], says: str
) -> None:
    done = toolchain(
        *("pack", str(built), "--form", "image"),
        *("--base", str(saved(tmp_path / "base.tar", layers)), "--out", str(tmp_path / "image.tar")),
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "hint: " in done.stderr
    assert not list(tmp_path.glob("*image.tar*"))


@pytest.mark.parametrize(
    "above",
    [
        ["usr/lib/.wh.python3.1", "usr/bin/.wh.python"],
        ["usr/bin/.wh..wh..opq", "usr/bin/python3"],
        ["usr/.wh.lib", "usr/lib/python3.12/http/client.py"],
    ],
    ids=["others are taken away", "replaced whole", "a newer one"],
)
def test_what_a_layer_takes_away_is_of_those_below_it(tmp_path: Path, above: list[str]) -> None:
    layers = [*layers_for(), tar_of(*above)]
    forms.check_base(saved(tmp_path / "base.tar", layers), read_target("x86-cpu"))


def test_a_base_must_have_the_libraries_that_a_device_has_of_its_own(tmp_path: Path) -> None:
    target = read_target("x86-cpu")
    wanted = ("libcudart.so.13", "libcublas.so.13")
    target = target.model_copy(update={"runtime": target.runtime.model_copy(update={"device_libraries": wanted})})
    plain = layers_for()
    with pytest.raises(HostError, match=r"no libcublas\.so\.13, libcudart\.so\.13 in it") as caught:
        forms.check_base(saved(tmp_path / "plain.tar", plain), target)
    assert "toolchain base --target" in str(caught.value.hint)
    folder = "usr/local/cuda-13.0/lib64"
    whole = [*plain, tar_of(*(f"{folder}/{name}" for name in wanted))]
    forms.check_base(saved(tmp_path / "whole.tar", whole), target)


def _not_there(path: Path) -> Path:
    return path / "none.tar"


def _text(path: Path) -> Path:
    (path / "base.tar").write_text("hello\n" * 500)
    return path / "base.tar"


def _compressed(path: Path) -> Path:
    base = saved(path / "base.tar")
    base.write_bytes(gzip.compress(base.read_bytes()))
    return base


def _other_tar(path: Path) -> Path:
    return write_tar(path / "base.tar", {"readme": b"hello"})


def _not_json(path: Path) -> Path:
    return write_tar(path / "base.tar", {"manifest.json": b"{"})


def _layer_missing(path: Path) -> Path:
    base = saved(path / "base.tar")
    content = read(base)
    return write_tar(base, {name: data for name, data in content.items() if not name.endswith("layer.tar")})


def _blob_missing(path: Path) -> Path:
    folder = layout(path / "base")
    next(file for file in folder.rglob("*") if file.is_file() and file.read_bytes()[:2] == b"\x1f\x8b").unlink()
    return folder


def _with_config(path: Path, **changed: Any) -> Path:
    base = saved(path / "base.tar")
    content = read(base)
    name = next(name for name in content if name.endswith(".json") and name != "manifest.json")
    content[name] = json.dumps({**json.loads(content[name]), **changed}).encode()
    return write_tar(base, content)


def _odd_settings(path: Path) -> Path:
    return _with_config(path, config=["sh"])


def _odd_history(path: Path) -> Path:
    return _with_config(path, history=["one", "two"])


def _odd_labels(path: Path) -> Path:
    return _with_config(path, config={"Labels": ["base"]})


def _odd_variables(path: Path) -> Path:
    return _with_config(path, config={"Env": {"PATH": "/bin"}})


def _layer_changed(path: Path) -> Path:
    base = saved(path / "base.tar")
    content = read(base)
    name = next(name for name in content if name.endswith("layer.tar"))
    content[name] = content[name].replace(b"os-release", b"os-releasf")
    return write_tar(base, content)


def _config_changed(path: Path) -> Path:
    folder = layout(path / "base")
    config = next(file for file in folder.rglob("*") if file.is_file() and b'"rootfs"' in file.read_bytes())
    config.write_bytes(config.read_bytes().replace(b"one", b"two"))
    return folder


def _zstd(path: Path) -> Path:
    return layout(path / "base", layer_type="application/vnd.oci.image.layer.v1.tar+zstd")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_not_there, "is not there"),
        (_text, "not a tar of an image"),
        (_compressed, "not a tar of an image"),
        (_other_tar, "neither an OCI layout nor what `docker save` writes"),
        (_not_json, "not an image as it should be"),
        (_layer_missing, "is not there"),
        (_blob_missing, "is not there"),
        (_odd_settings, "not an image as it should be: ValueError('config is no object')"),
        (_odd_history, "history is no list of objects"),
        (_odd_labels, "config.Labels is no object of texts"),
        (_odd_variables, "config.Env is no list of texts"),
        (_layer_changed, "is damaged"),
        (_config_changed, "is damaged: its SHA-256 differs"),
        (_zstd, "are not read here"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_base_that_is_none_is_one_clear_error(built: Path, tmp_path: Path, make: Any, says: str) -> None:
    with pytest.raises((HostError, ArtifactError)) as caught:
        pack(built, make(tmp_path), tmp_path / "image.tar")
    assert says in caught.value.message
    assert caught.value.hint
    assert not list(tmp_path.glob("*image.tar*"))


@pytest.mark.parametrize("empty", [{"config": None}, {"history": None}, {"config": {"Env": None, "Labels": None}}])
def test_a_base_need_not_say_anything_of_itself(built: Path, tmp_path: Path, empty: dict[str, Any]) -> None:
    pack(built, _with_config(tmp_path, **empty), tmp_path / "image.tar")
    config = config_in(read(tmp_path / "image.tar"))
    assert config["config"]["Labels"]["toolchain.bundle.id"] == files.open_bundle(built).id
    assert sum(not entry.get("empty_layer", False) for entry in config["history"]) == 5


def test_pack_says_what_is_missing_or_too_much(built: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.tar")
    for arguments, says in (
        (("--form", "image"), "--form image: --base is missing"),
        (("--form", "archive", "--base", "x"), "--base is for images"),
    ):
        done = toolchain("pack", str(built), *arguments, "--out", out)
        assert done.returncode == 2
        assert says in done.stderr


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("my..model", "1.0+cpu", ("my-model-x86-cpu", "1.0_cpu")),
        ("a-.b_", "1", ("a-b-x86-cpu", "1")),
        ("tiny", "1.0", ("tiny-x86-cpu", "1.0")),
    ],
)
def test_the_reference_is_one_that_docker_takes(name: str, version: str, expected: tuple[str, str]) -> None:
    manifest = {"name": name, "version": version, "target": {"name": "x86-cpu"}}
    assert image.reference(files.Bundle(Path(), manifest, "")) == expected
