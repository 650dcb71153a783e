"""A bundle as an image, without a container engine: the layers of a base as they are, and three of our own.

What changes together lies together: programs, model, and what describes them are layers of their own, so that a new
model does not ship the programs again. The file is an OCI layout (image-spec 1.1) and what `docker load` reads, both;
config keys that only Docker knows, such as Healthcheck, are those of the Docker image specification 1.3. The same
bundle on the same base gives the same bytes.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from toolchain.bundle import archive
from toolchain.bundle.base_image import GZIP_LAYER, PLAIN_LAYER, BaseImage, open_base
from toolchain.device import files, tape
from toolchain.errors import ArtifactError
from toolchain.reporter import Reporter, bar

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
ROOT = "bundle"
"""Folder of the bundle in the image."""
USER = "65532:65532"
"""Nobody's, by number, so that Kubernetes can see that it is not root."""
PORT = 8080
KEY_FILE = "/run/secrets/api_key"
"""Where Docker puts the secret `api_key`; the server is open to a network only with a key."""
CREATED = "1970-01-01T00:00:00Z"
_SECOND_NS = 1_000_000_000
_PLATFORMS = {"x86_64": {"architecture": "amd64"}, "aarch64": {"architecture": "arm64", "variant": "v8"}}
_HEALTH = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health', timeout=4)"
HEALTH = ["python3", "-I", "-S", "-c", _HEALTH]
"""What the image asks itself."""


@dataclass(frozen=True)
class Blob:
    """What was written under its own digest."""

    sha256: str
    bytes: int
    media_type: str
    diff_id: str
    """SHA-256 of a layer when it is not compressed."""

    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": f"sha256:{self.sha256}", "size": self.bytes}


def platform(arch: str) -> dict[str, str]:
    """As images call the machine that uname calls `arch`."""
    return {"os": "linux", **_PLATFORMS[arch]}


def pack(folder: Path, out: Path, *, base: Path, report: Reporter, force: bool = False) -> dict[str, Any]:
    """Write the image of the bundle in `folder` on `base` to the file `out`; digest and sizes come back.

    Raises ArtifactError when the bundle is not as built, HostError for the disk or a base that will not do.
    """
    bundle = archive.open_to_pack(folder)
    arch = str(bundle.manifest["target"]["arch"])
    with open_base(base, platform(arch)) as stands_on:
        stands_on.check_contents(
            bundle.manifest["target"]["name"], arch, bundle.manifest["runtime"]["device_libraries"]
        )
        size = archive.total_bytes(bundle) + sum(layer.bytes for layer in stands_on.layers)
        with (
            archive.finished(out, folder, size, force=force) as file,
            bar(report, "pack", total=4, unit="layer") as task,
        ):
            result = _write(Layout(file), bundle, stands_on, platform(arch), task.advance)
    report.line(f"{out}: {result['bytes'] / 2**20:.1f} MiB, sha256:{result['digest'][:12]}…")
    return result


def _write(
    layout: "Layout", bundle: files.Bundle, base: BaseImage, platform: dict[str, str], advance: Callable[[], None]
) -> dict[str, Any]:
    layers = [_base_layer(layout, base, index) for index in range(len(base.layers))]
    advance()
    own = []
    for name, paths in layers_of(bundle):
        own.append((name, layout.layer(bundle, paths)))
        advance()
    layers += [blob for _, blob in own]
    config = _config(bundle, base, platform, own)
    repository, tag = reference(bundle)
    digest, size = finish(
        layout, layers, config, platform, name=f"{repository}:{tag}", annotations=labels(bundle, base)
    )
    return {
        "digest": digest,
        "bytes": size,
        "layers": {name: {"digest": f"sha256:{blob.sha256}", "bytes": blob.bytes} for name, blob in own},
        "base_bytes": sum(layer.bytes for layer in base.layers),
        "reference": f"{repository}:{tag}",
    }


def finish(
    layout: "Layout",
    layers: list[Blob],
    config: dict[str, Any],
    platform: dict[str, str],
    *,
    name: str,
    annotations: dict[str, str],
) -> tuple[str, int]:
    """Write what makes an image called `name` of layers: the manifest's SHA-256 in hex, and the bytes of all."""
    described = layout.blob_of(_json(config), CONFIG_TYPE)
    manifest = layout.blob_of(
        _json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": described.descriptor(),
                "layers": [blob.descriptor() for blob in layers],
                "annotations": annotations,
            }
        ),
        MANIFEST_TYPE,
    )
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            {
                **manifest.descriptor(),
                "platform": platform,
                "annotations": {
                    "org.opencontainers.image.ref.name": name.partition(":")[2],
                    "io.containerd.image.name": f"docker.io/library/{name}",
                },
            }
        ],
    }
    for_docker = [
        {
            "Config": f"blobs/sha256/{described.sha256}",
            "RepoTags": [name],
            "Layers": [f"blobs/sha256/{blob.sha256}" for blob in layers],
        }
    ]
    layout.file("index.json", _json(index))
    layout.file("manifest.json", _json(for_docker))
    return manifest.sha256, layout.end()


def layers_of(bundle: files.Bundle) -> list[tuple[str, list[str]]]:
    """Name → paths of each layer, in order: what changes least comes first."""
    model = str(bundle.manifest["model"]["file"])
    parts = tuple(f"{folder}/" for folder in (str(bundle.manifest["runtime"]["folder"]), "device", "LICENSES"))
    runtime = sorted(path for path in bundle.manifest["files"] if path.startswith(parts) or path == "edgectl")
    signature = [files.SIGNATURE] if (bundle.root / files.SIGNATURE).is_file() else []
    rest = sorted(set(bundle.manifest["files"]) - {model, *runtime})
    return [
        ("runtime", runtime),
        ("model", [model]),
        ("description", sorted([files.MANIFEST, files.SUMS, *signature, *rest])),
    ]


def reference(bundle: files.Bundle) -> tuple[str, str]:
    """Repository and tag, in the characters that Docker allows."""
    name = f"{bundle.manifest['name']}-{bundle.manifest['target']['name']}"
    repository = re.sub(r"[._-]*-[._-]*|[._]{2,}", "-", name).strip("._-")
    return repository, str(bundle.manifest["version"]).replace("+", "_")


def labels(bundle: files.Bundle, base: BaseImage) -> dict[str, str]:
    """org.opencontainers.image.*, and which bundle it is."""
    manifest = bundle.manifest
    found = {
        "org.opencontainers.image.title": f"{manifest['name']} for {manifest['target']['name']}",
        "org.opencontainers.image.version": str(manifest["version"]),
        "org.opencontainers.image.description": f"A language model, served on {manifest['target']['description']}",
        "org.opencontainers.image.created": CREATED,
        "toolchain.bundle.id": bundle.id,
    }
    if base.digest is not None:
        found["org.opencontainers.image.base.digest"] = base.digest
    return dict(sorted(found.items()))


def _config(
    bundle: files.Bundle, base: BaseImage, platform: dict[str, str], own: list[tuple[str, Blob]]
) -> dict[str, Any]:
    """How it is started: as nobody, with the root as it is, `edgectl serve`, asked for its health."""
    start_s = float(bundle.presets()["server"]["ready_timeout_s"])
    inherited = {key: value for key, value in (base.config.get("config") or {}).items() if key in ("Env", "Labels")}
    history = [*base.history(), *({"created": CREATED, "created_by": f"toolchain pack: {name}"} for name, _ in own)]
    return {
        "created": CREATED,
        **platform,
        "config": {
            **inherited,
            "User": USER,
            "WorkingDir": "/",
            "Entrypoint": ["python3", "-I", "-S", f"/{ROOT}/edgectl", "serve"],
            "Cmd": ["--host", "0.0.0.0", "--port", str(PORT), "--api-key-file", KEY_FILE],  # noqa: S104 - with a key
            "ExposedPorts": {f"{PORT}/tcp": {}},
            "StopSignal": "SIGTERM",
            "Healthcheck": {
                "Test": ["CMD", *HEALTH],
                "Interval": 30 * _SECOND_NS,
                "Timeout": 5 * _SECOND_NS,
                "StartPeriod": int(start_s * _SECOND_NS),
                "Retries": 3,
            },
            "Labels": {**(inherited.get("Labels") or {}), **labels(bundle, base)},
        },
        "rootfs": {
            "type": "layers",
            "diff_ids": [*(f"sha256:{layer.diff_id}" for layer in base.layers)]
            + [f"sha256:{blob.diff_id}" for _, blob in own],
        },
        "history": history,
    }


def _base_layer(layout: "Layout", base: BaseImage, index: int) -> Blob:
    layer = base.layers[index]
    media_type = GZIP_LAYER if layer.gzip else PLAIN_LAYER
    blob = layout.blob(lambda write: base.copy(index, write), media_type, diff_id=layer.diff_id)
    if blob.sha256 != layer.sha256:
        raise ArtifactError(
            f"{base.path}: layer {index + 1} is damaged: its SHA-256 differs", hint="save the base again"
        )
    return blob


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode()


class Layout:
    """An OCI layout inside a tar. A blob is called by its digest, which is known when it has been written: its header
    is put in then, so that nothing is read twice."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._blobs: set[str] = set()
        self.file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        for folder in ("blobs/", "blobs/sha256/"):
            file.write(tape.header(folder, mode=0o755, size=0, kind=tape.FOLDER))

    def file(self, name: str, content: bytes) -> None:
        self._file.write(tape.header(name, mode=0o644, size=len(content)) + content + tape.padding(len(content)))

    def blob_of(self, content: bytes, media_type: str) -> Blob:
        return self.blob(lambda write: write(content), media_type)

    def layer(self, bundle: files.Bundle, paths: list[str]) -> Blob:
        """A layer of the bundle's files."""

        def copy(write: Callable[[bytes], None]) -> None:
            writer = archive.Writer(write)
            for path in paths:
                writer.folders(f"{ROOT}/{path}")
                writer.add(f"{ROOT}/{path}", bundle, path)
            writer.end()

        return self.blob(copy, PLAIN_LAYER)

    def blob(self, copy: Callable[[Callable[[bytes], None]], None], media_type: str, *, diff_id: str = "") -> Blob:
        """Write what `copy` hands over, and call it by its digest."""
        start = self._file.tell()
        self._file.write(bytes(tape.BLOCK))
        digest, size = hashlib.sha256(), 0

        def write(block: bytes) -> None:
            nonlocal size
            digest.update(block)
            size += len(block)
            self._file.write(block)

        copy(write)
        sha256 = digest.hexdigest()
        if sha256 in self._blobs:
            # A base may have the same layer twice; a blob is there once.
            self._file.seek(start)
            self._file.truncate()
        else:
            self._blobs.add(sha256)
            self._file.write(tape.padding(size))
            end = self._file.tell()
            self._file.seek(start)
            self._file.write(tape.header(f"blobs/sha256/{sha256}", mode=0o644, size=size))
            self._file.seek(end)
        return Blob(sha256, size, media_type, diff_id or sha256)

    def end(self) -> int:
        self._file.write(tape.END)
        return self._file.tell()
