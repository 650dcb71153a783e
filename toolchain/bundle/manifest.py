"""The form of a bundle's manifest.json, from which docs/manifest.schema.json is printed."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from toolchain.recipe import Sha256
from toolchain.settings import Settings


class _Part(Settings):
    """Strict; unlike settings it is written by us, and None is said rather than left out."""

    model_config = ConfigDict(protected_namespaces=())


class FileFacts(_Part):
    sha256: Sha256
    bytes: int = Field(ge=0)
    mode: Literal["0644", "0755"]


class Target(_Part):
    """What the bundle was made for."""

    name: str
    description: str
    arch: Literal["x86_64", "aarch64"]


class Runtime(_Part):
    """The programs, and what they ask of the device."""

    folder: str
    """Folder of programs, libraries and compute backends."""
    llama_cpp_commit: str
    flags: list[str]
    """CMake options."""
    backend: str
    """What llama-server must report that it computes with."""
    glibc_floor: str
    """What the target promises."""
    glibc_needed: str
    """What the programs ask for in fact: a version, or "none" of static ones."""
    device_libraries: list[str]
    """Libraries that the device must have, beside glibc."""
    segment_alignment: int
    """Largest pages, in bytes, with which the programs can be mapped."""
    files: list[str]
    bytes: int
    compiler: str
    """As the programs themselves say."""


class Token(_Part):
    id: int
    text: str | None


class Model(_Part):
    """The GGUF, as its header describes it."""

    file: str
    sha256: Sha256
    bytes: int
    architecture: str
    parameters: int
    file_type: str | None
    bits_per_weight: float
    bytes_per_token: int
    """Weights that are read for each token: all but an embedding table that is not the output as well."""
    cache_bytes: int
    """Keys and values of the whole context, in 16 bits."""
    tensor_types: dict[str, int]
    quantize: dict[str, Any]
    """What was asked of the quantizer and what it did, quantize.json."""
    licence: str | None
    """general.license."""
    context: int
    """Tokens that the server holds, of all slots together."""
    context_trained: int | None
    parallel: int
    chat_template_sha256: Sha256 | None
    bos: Token | None
    eos: Token


class Unmeasured(_Part):
    """What only the device can tell, and how to ask it."""

    measured: Literal[False]
    command: str


class BundleManifest(_Part):
    """Everything a device needs to know of a bundle. SHA256SUMS lists this file, and its signature is for both."""

    schema_version: Literal[1]
    bundle_id: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """SHA-256 of this object without this key: sorted keys, no spaces, ASCII."""
    name: str
    version: str
    target: Target
    runtime: Runtime
    model: Model
    lineage: dict[str, str]
    """Stage → digest of what it made, from the teacher on."""
    quality: dict[str, Any] | None
    """The ledger with its gates; null: not evaluated."""
    on_device: dict[str, Unmeasured]
    """Speed, start, memory: a bundle is built before it has run anywhere."""
    sbom: str
    """Path of the CycloneDX document."""
    files: dict[str, FileFacts]
    """Every file but this one, SHA256SUMS and its signature."""
