"""The image that a bundle's image stands on, read from an OCI layout or from what `docker save` writes.

https://github.com/opencontainers/image-spec: image-layout.md, manifest.md, config.md.
"""

import gzip
import hashlib
import json
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from toolchain.errors import HostError

PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"
GZIP_LAYER = PLAIN_LAYER + "+gzip"
_GZIP_TYPES = (GZIP_LAYER, "application/vnd.docker.image.rootfs.diff.tar.gzip")
_PLAIN_TYPES = (PLAIN_LAYER, "application/vnd.docker.image.rootfs.diff.tar")
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_PYTHON_NEEDED = 10
_JSON_LIMIT_BYTES = 16 << 20
_BLOCK_BYTES = 1 << 20
_LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
_PYTHON = re.compile(r"usr/(?:local/)?bin/python3")
_PYTHON_LIBRARY = re.compile(r"usr/(?:local/)?lib/python3\.(\d+)/http/client\.py")
"""Of a Python with its whole standard library: Debian's python3-minimal has no json, no http."""
_WHITEOUT = ".wh."
"""What such a name continues with, the layers below do not have any more; image-spec: layer.md."""
_OPAQUE = ".wh..wh..opq"
"""Of the folder that has this, all that is in it below."""
_SAVE = "for example: docker save -o base.tar debian:bookworm-slim"


class Store(Protocol):
    """Files by name, wherever they lie."""

    def open(self, name: str) -> BinaryIO: ...
    def has(self, name: str) -> bool: ...


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()

    def open(self, name: str) -> BinaryIO:
        return (self._path / name).open("rb")


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {member.name.removeprefix("./"): member for member in archive}

    def has(self, name: str) -> bool:
        return self._member(name) is not None

    def open(self, name: str) -> BinaryIO:
        member = self._member(name)
        file = self._archive.extractfile(member) if member is not None else None
        if file is None:
            raise FileNotFoundError(name)
        return file  # type: ignore[return-value]

    def _member(self, name: str) -> tarfile.TarInfo | None:
        """Older engines save a layer that comes twice as a link to the first."""
        member = self._members.get(name)
        if member is not None and member.issym():
            member = self._members.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)))
        return member if member is not None and member.isreg() else None


@dataclass(frozen=True)
class BaseLayer:
    """One layer as it is stored."""

    file: str
    sha256: str
    """Of its stored bytes, as the manifest or the config promises."""
    diff_id: str
    """Of its tar, in hex."""
    bytes: int
    gzip: bool


@dataclass(frozen=True)
class BaseImage:
    """An image for one platform."""

    path: Path
    config: dict[str, Any]
    layers: tuple[BaseLayer, ...]
    digest: str | None
    """Of its manifest; None where it has none."""
    store: Store

    def history(self) -> list[dict[str, Any]]:
        """Entries for exactly its layers: what the image says, or, where that does not fit, that it is the base."""
        entries: list[dict[str, Any]] = self.config.get("history") or []
        if sum(not entry.get("empty_layer", False) for entry in entries) == len(self.layers):
            return entries
        return [{"created_by": "base"} for _ in self.layers]

    def copy(self, index: int, write: Callable[[bytes], None]) -> None:
        """Hand over the stored bytes of a layer, in parts."""
        with self.store.open(self.layers[index].file) as file:
            while block := file.read(_BLOCK_BYTES):
                write(block)

    def check_contents(self, target: str, arch: str, libraries: Sequence[str]) -> None:
        """It has the C library and the Python that a bundle needs, and the device's own libraries. Raises HostError."""
        found = self._found({_LOADERS[arch], *libraries})
        names = {posixpath.basename(path) for path in found}
        if _LOADERS[arch] not in names:
            hint = "musl will not do (Alpine); debian:bookworm-slim with the package python3 does"
            raise HostError(f"{self.path}: no glibc for {arch} in it", hint=hint)
        python = max((int(match[1]) for path in found if (match := _PYTHON_LIBRARY.fullmatch(path))), default=-1)
        if python < _PYTHON_NEEDED:
            has = f"Python 3.{python}" if python >= 0 else "no Python with its standard library"
            raise HostError(
                f"{self.path}: {has} in it, edgectl needs 3.{_PYTHON_NEEDED} or newer",
                hint="apt-get install python3; python3-minimal is not enough",
            )
        if not any(_PYTHON.fullmatch(path) for path in found):
            hint = "apt-get install python3, which makes /usr/bin/python3"
            raise HostError(f"{self.path}: no program python3 in it, which runs edgectl", hint=hint)
        missing = set(libraries) - names
        if missing:
            raise HostError(
                f"{self.path}: no {', '.join(sorted(missing))} in it, which the bundle's programs need",
                hint=f"`toolchain base --target {target}` makes one that has them, or says what does",
            )

    def _found(self, wanted: set[str]) -> set[str]:
        """Paths of Python and of files with a `wanted` name; what a layer above takes away is not among them."""
        found: set[str] = set()
        for layer in self.layers:
            names = [posixpath.normpath(name).lstrip("/") for name in self._names(layer)]
            gone = [name for name in names if posixpath.basename(name).startswith(_WHITEOUT)]
            found = {path for path in found if not any(_takes_away(whiteout, path) for whiteout in gone)}
            found.update(
                name
                for name in names
                if posixpath.basename(name) in wanted or _PYTHON.fullmatch(name) or _PYTHON_LIBRARY.fullmatch(name)
            )
        return found

    def _names(self, layer: BaseLayer) -> Iterator[str]:
        try:
            with (
                self.store.open(layer.file) as file,
                tarfile.open(fileobj=file, mode="r|gz" if layer.gzip else "r|") as tar,
            ):
                for member in tar:
                    yield member.name
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise HostError(f"{self.path}: layer {layer.file} is damaged: {error}", hint="save it again") from None
        except OSError as error:
            raise HostError(f"{self.path}: layer {layer.file} cannot be read: {error.strerror}") from None


def _takes_away(whiteout: str, path: str) -> bool:
    """Whether `path`, of a layer below, is not there any more."""
    folder, name = posixpath.split(whiteout)
    if name == _OPAQUE:
        return path.startswith(f"{folder}/" if folder else "")
    hidden = posixpath.join(folder, name.removeprefix(_WHITEOUT))
    return path == hidden or path.startswith(f"{hidden}/")


@contextmanager
def open_base(path: Path, platform: dict[str, str]) -> Iterator[BaseImage]:
    """The image for `platform` in an OCI layout (folder or tar) or a `docker save` tar. Raises HostError."""
    with ExitStack() as stack:
        try:
            store = _Folder(path) if path.is_dir() else _Tar(stack.enter_context(tarfile.open(path, "r:")))
            if store.has("index.json"):
                base = _from_layout(path, store, platform)
            elif store.has("manifest.json"):
                base = _from_save(path, store)
            else:
                raise HostError(f"{path}: neither an OCI layout nor what `docker save` writes", hint=_SAVE)
            _check_config(base.config)
            for layer in base.layers:
                if not store.has(layer.file):
                    raise FileNotFoundError(layer.file)
        except FileNotFoundError as error:
            raise HostError(f"{path}: {error.filename or error} is not there", hint=_SAVE) from None
        except (tarfile.TarError, EOFError) as error:
            raise HostError(f"{path}: not a tar of an image: {error}", hint=f"not compressed; {_SAVE}") from None
        except OSError as error:
            raise HostError(f"{path}: cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HostError(f"{path}: not an image as it should be: {error!r}", hint=_SAVE) from None
        has = {key: base.config.get(key) for key in ("os", "architecture")}
        if has != {key: platform[key] for key in has}:
            wanted = f"{platform['os']}/{platform['architecture']}"
            raise HostError(
                f"{path}: is for {has['os']}/{has['architecture']}, the bundle for {wanted}",
                hint=f"docker pull --platform {wanted}, then docker save",
            )
        if not base.layers:
            raise HostError(f"{path}: has no layers", hint=_SAVE)
        yield base


def _check_config(config: dict[str, Any]) -> None:
    """What an image takes over from its base is of the types that engines read. Raises ValueError."""
    own, history = config.get("config") or {}, config.get("history") or []
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError("history is no list of objects")
    if not isinstance(own, dict):
        raise ValueError("config is no object")
    variables, labels = own.get("Env") or [], own.get("Labels") or {}
    if not isinstance(variables, list) or not all(isinstance(entry, str) for entry in variables):
        raise ValueError("config.Env is no list of texts")
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        raise ValueError("config.Labels is no object of texts")


def _json(store: Store, name: str, digest: str | None = None) -> Any:
    with store.open(name) as file:
        content = file.read(_JSON_LIMIT_BYTES + 1)
    if len(content) > _JSON_LIMIT_BYTES:
        raise ValueError(f"{name} is too long")
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{name} is damaged: its SHA-256 differs")
    return json.loads(content)


def _hex(digest: str) -> str:
    kind, _, value = digest.partition(":")
    if kind != "sha256" or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{digest} is no SHA-256")
    return value


def _blob(digest: str) -> str:
    return f"blobs/sha256/{_hex(digest)}"


def _from_layout(path: Path, store: Store, platform: dict[str, str]) -> BaseImage:
    descriptor = _choose(path, store, _json(store, "index.json")["manifests"], platform)
    manifest = _json(store, _blob(descriptor["digest"]), _hex(descriptor["digest"]))
    config = _json(store, _blob(manifest["config"]["digest"]), _hex(manifest["config"]["digest"]))
    diff_ids = config["rootfs"]["diff_ids"]
    layers = []
    for layer, diff_id in zip(manifest["layers"], diff_ids, strict=True):
        if layer["mediaType"] not in (*_GZIP_TYPES, *_PLAIN_TYPES):
            hint = "skopeo copy --dest-compress-format gzip makes layers that every engine reads"
            raise HostError(f"{path}: layers of type {layer['mediaType']} are not read here", hint=hint)
        layers.append(
            BaseLayer(
                file=_blob(layer["digest"]),
                sha256=_hex(layer["digest"]),
                diff_id=_hex(diff_id),
                bytes=int(layer["size"]),
                gzip=layer["mediaType"] in _GZIP_TYPES,
            )
        )
    return BaseImage(path, config, tuple(layers), str(descriptor["digest"]), store)


def _choose(path: Path, store: Store, manifests: list[dict[str, Any]], platform: dict[str, str]) -> dict[str, Any]:
    """The manifest for the platform; where there is but one, its config will tell."""
    while len(manifests) == 1 and manifests[0]["mediaType"] in _INDEX_TYPES:
        manifests = _json(store, _blob(manifests[0]["digest"]), _hex(manifests[0]["digest"]))["manifests"]
    if len(manifests) == 1:
        return manifests[0]
    wanted = (platform["os"], platform["architecture"])
    of = [(entry.get("platform") or {}) for entry in manifests]
    fitting = [
        entry for entry, has in zip(manifests, of, strict=True) if (has.get("os"), has.get("architecture")) == wanted
    ]
    if len(fitting) != 1:
        shown = ", ".join(f"{has.get('os')}/{has.get('architecture')}" for has in of) or "nothing"
        raise HostError(
            f"{path}: holds {len(fitting)} images for {'/'.join(wanted)}, not one (there are: {shown})", hint=_SAVE
        )
    return fitting[0]


def _from_save(path: Path, store: Store) -> BaseImage:
    """The form of Docker before 25: layers are plain tars, whose digests the config has."""
    images = _json(store, "manifest.json")
    if len(images) != 1:
        raise HostError(f"{path}: holds {len(images)} images, not one", hint=_SAVE)
    config = _json(store, images[0]["Config"])
    layers = []
    for name, diff_id in zip(images[0]["Layers"], config["rootfs"]["diff_ids"], strict=True):
        with store.open(name) as file:
            size = file.seek(0, 2)
        layers.append(BaseLayer(file=name, sha256=_hex(diff_id), diff_id=_hex(diff_id), bytes=size, gzip=False))
    return BaseImage(path, config, tuple(layers), None, store)
