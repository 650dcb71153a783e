"""GGUF + runtime → a bundle's folder: everything that a device needs, every file hashed, the same bytes each time."""

import errno
import hashlib
import importlib.metadata
import json
import os
import stat
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from toolchain.bundle import answers, card, command, sbom
from toolchain.bundle.manifest import BundleManifest
from toolchain.device import files as layout
from toolchain.errors import ArtifactError, DataError, HostError, ModelError
from toolchain.recipe import Name
from toolchain.reporter import Reporter, bar
from toolchain.resources import resource
from toolchain.settings import Settings
from toolchain.target import TargetProfile

if TYPE_CHECKING:
    from toolchain.gguf.header import GgufFacts
    from toolchain.gguf.llama_cpp import LlamaCpp

_DEVICE = Path(layout.__file__).parent
_ENTRY = "edgectl.py"
_PROGRAM_MODE, _FILE_MODE, _FOLDER_MODE = 0o755, 0o644, 0o755
_BLOCK_BYTES = 1 << 20
REST_BYTES = 2 << 20
"""All of a bundle that is neither model nor programs, at most: edgectl, texts, the web page, recorded answers."""
SBOM = "sbom.cdx.json"
_ON_DEVICE = {"works": "smoke", "tokens_per_second": "bench", "cold_start": "bench", "memory": "bench"}
_GCC_NOTE = """libstdc++.so.6 and libgcc_s.so.1 are parts of the GNU Compiler Collection, copied without change but for
debugging symbols. They are under the GNU General Public License, version 3, with the GCC Runtime Library Exception,
version 3.1: programs that use them may be conveyed under terms of one's choice.
Source: https://gcc.gnu.org/ — licence texts: https://www.gnu.org/licenses/gpl-3.0.txt and
https://www.gnu.org/licenses/gcc-exception-3.1.html
"""


class BundleSettings(Settings):
    """What the bundle is called, and how much context it serves."""

    name: Name
    version: str = Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,31}$")
    context: int = Field(ge=128)
    """Tokens, of all slots together."""
    system: str | None = None
    """The system message that the student was trained with."""


def run(
    settings: BundleSettings,
    *,
    target: TargetProfile,
    gguf: Path,
    quantize_facts: dict[str, Any],
    ledger: dict[str, Any] | None,
    golden: list[dict[str, Any]],
    lineage: dict[str, str],
    llama: "LlamaCpp",
    answering: "LlamaCpp | None",
    out: Path,
    report: Reporter,
    gguf_sha256: str | None = None,
) -> dict[str, Any]:
    """Make out/<name>-<version>-<target>/ and return its facts.

    `quantize_facts` and `ledger` go into the manifest as they are, so they must hold no times and no paths;
    `quantize_facts["fallbacks"]`, where there is one, lists tensors that got another type than asked for. `golden` is
    a list of {"messages", "prompt_ids"}; `answering`, a build that runs here, answers them for the device to compare
    with, unless it is None. The model is read once, and held against `gguf_sha256` where that is known;
    the facts' "digests", path below `out` → SHA-256, spare whoever comes next reading it again. Raises ModelError,
    DataError, HostError, ArtifactError, ExternalToolError.
    """
    from toolchain.bundle import runtime
    from toolchain.gguf.header import read_facts

    facts = read_facts(gguf)
    _check_model(facts, gguf, settings, target)
    _check_memory(facts, gguf, settings, target)
    _check_golden(golden, settings, target)
    folder = out / f"{settings.name}-{settings.version}-{target.name}"
    folder.mkdir()
    model = f"model/{file_name(settings, facts, gguf)}"
    with bar(report, "bundle", total=5, unit="step") as task:
        programs = runtime.collect(llama, target, folder / command.PROGRAMS)
        _check_disk(facts.file_bytes, programs.bytes, gguf, target)
        task.advance()
        model_sha256 = _place(gguf, folder / model, expected=gguf_sha256)
        task.advance()
        presets = command.presets(target, model=model, alias=settings.name, context=settings.context)
        _write_json(folder / layout.PRESETS, presets)
        _write_json(folder / layout.GOLDEN, golden)
        _copy_device(folder)
        _write_web(folder / command.WEB, settings)
        if answering is not None:
            room = settings.context // target.server.parallel
            found = answers.record(folder, presets, golden, room=room, llama=answering)
            _write_json(folder / layout.ANSWERS, found)
        task.advance()
        _write(folder / "Modelfile", _modelfile(facts, settings, model))
        _write_licences(folder / "LICENSES", llama)
        description: dict[str, Any] = {
            "schema_version": layout.SCHEMA_VERSION,
            "name": settings.name,
            "version": settings.version,
            "target": {"name": target.name, "description": target.description, "arch": target.arch},
            "runtime": {
                "folder": command.PROGRAMS,
                "llama_cpp_commit": llama.commit,
                "flags": list(llama.flags),
                "backend": target.runtime.backend,
                "glibc_floor": target.runtime.glibc_floor,
                "device_libraries": list(target.runtime.device_libraries),
                **asdict(programs),
            },
            "model": {
                "file": model,
                "sha256": model_sha256,
                "licence": _model_licence(gguf),
                "cache_bytes": _cache_bytes(facts, gguf, settings.context),
                **_model_facts(facts, settings, target, quantize_facts),
            },
            "lineage": dict(sorted(lineage.items())),
            "quality": ledger,
            "on_device": {
                name: {"measured": False, "command": f"./edgectl {verb}"} for name, verb in _ON_DEVICE.items()
            },
            "sbom": SBOM,
        }
        _write(folder / "MODEL_CARD.md", card.render(description))
        files = _hashed(folder, known={model: model_sha256})
        parts = sbom.render(
            description, files, compiler=programs.compiler, model_licence=description["model"]["licence"]
        )
        _write_json(folder / SBOM, parts)
        files |= _hashed(folder, known={path: str(entry["sha256"]) for path, entry in files.items()})
        task.advance()
        manifest = _seal(folder, {**description, "files": files})
        task.advance()
    total_bytes = sum(int(entry["bytes"]) for entry in files.values())
    report.line(f"{folder.name}: {total_bytes / 2**20:.1f} MiB, {manifest['bundle_id'][:19]}…")
    return {
        "summary": f"{total_bytes / 1e6:.1f} MB in {len(files)} files, glibc needed: {programs.glibc_needed}",
        "folder": folder.name,
        "bundle_id": manifest["bundle_id"],
        "bytes": total_bytes,
        "model_bytes": facts.file_bytes,
        "runtime_bytes": programs.bytes,
        "glibc_needed": programs.glibc_needed,
        "segment_alignment": programs.segment_alignment,
        "bits_per_weight": facts.bits_per_weight,
        "files": len(files),
        "digests": {f"{folder.name}/{path}": entry["sha256"] for path, entry in files.items()},
    }


def _seal(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write manifest.json and SHA256SUMS; the same modes whatever the umask is here."""
    manifest = {**content, "bundle_id": layout.bundle_id(content)}
    text = _json(manifest)
    BundleManifest.model_validate_json(text)
    layout.parse_manifest(text.encode())
    _write(folder / layout.MANIFEST, text)
    _write(folder / layout.SUMS, layout.sums_text(manifest, hashlib.sha256(text.encode()).hexdigest()))
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(_FOLDER_MODE)
    return manifest


def _model_licence(gguf: Path) -> str | None:
    from toolchain.gguf.header import read_metadata

    licence = read_metadata(gguf).get("general.license")
    return licence if isinstance(licence, str) and licence else None


def file_name(settings: BundleSettings, facts: "GgufFacts", gguf: Path) -> str:
    """As the GGUF naming convention has it: name, size, version, type."""
    from gguf.utility import naming_convention

    from toolchain.gguf.header import read_metadata

    size = read_metadata(gguf).get("general.size_label")
    name: str = naming_convention(None, settings.name, None, f"v{settings.version}", size, facts.file_type)
    return f"{name}.gguf"


def _modelfile(facts: "GgufFacts", settings: BundleSettings, model: str) -> str:
    from toolchain.bundle import modelfile

    assert facts.chat_template is not None
    assert facts.eos_token is not None
    return modelfile.render(
        model=model,
        template=facts.chat_template,
        bos=facts.bos_token,
        eos=facts.eos_token,
        stops=[facts.eos_token],
        context=settings.context,
        system=settings.system,
    )


def _check_model(facts: "GgufFacts", gguf: Path, settings: BundleSettings, target: TargetProfile) -> None:
    """What a chat server cannot do without."""
    if facts.chat_template is None:
        raise ModelError(f"{gguf}: no chat template in it", hint="the student's tokenizer must have one")
    if facts.eos_id is None or facts.eos_token is None:
        raise ModelError(f"{gguf}: no eos token in it: answers would not end")
    if facts.context_length is not None and settings.context > facts.context_length * target.server.parallel:
        raise ModelError(
            f"{gguf}: the model was made for {facts.context_length} tokens, {settings.context} are asked for",
            hint="lower bundle.context",
        )


def _cache_bytes(facts: "GgufFacts", gguf: Path, context: int) -> int:
    """Keys and values of `context` tokens in 16 bits."""
    from toolchain.gguf.header import read_metadata

    known = read_metadata(gguf)

    def number(key: str) -> int:
        value = known.get(f"{facts.architecture}.{key}")
        return max(value) if isinstance(value, list) else int(value or 0)

    heads = number("attention.head_count")
    width = number("attention.key_length") or number("embedding_length") // max(heads, 1)
    return 4 * number("block_count") * (number("attention.head_count_kv") or heads) * width * context


def _bytes_per_token(facts: "GgufFacts") -> int:
    """A tied embedding table is the output too; of another one, one row is read."""
    names = {tensor.name for tensor in facts.tensors}
    unread = "token_embd.weight" if "output.weight" in names else None
    return sum(tensor.bytes for tensor in facts.tensors if tensor.name != unread)


def _check_memory(facts: "GgufFacts", gguf: Path, settings: BundleSettings, target: TargetProfile) -> None:
    """Weights, keys and values of the whole context in 16 bits, and the server's own share, in the target's memory."""
    if target.memory_mib is None:
        return
    cache = _cache_bytes(facts, gguf, settings.context)
    needed = facts.file_bytes + cache + layout.SERVER_BYTES
    if needed > target.memory_mib << 20:
        raise ModelError(
            f"{gguf}: needs {needed / 2**20:.0f} MiB on the device: {facts.file_bytes / 2**20:.0f} for the weights, "
            f"{cache / 2**20:.0f} for a context of {settings.context} tokens, {layout.SERVER_BYTES >> 20} for the "
            f"server; {target.name} has {target.memory_mib}",
            hint="lower bundle.context, take a smaller quantize.file_type, or write a profile with more memory_mib",
        )


def _check_disk(model_bytes: int, programs_bytes: int, gguf: Path, target: TargetProfile) -> None:
    """A release has room on the smallest board that is meant."""
    needed = model_bytes + programs_bytes + REST_BYTES
    if target.disk_mib is not None and needed > target.disk_mib << 20:
        raise ModelError(
            f"{gguf}: the bundle takes {needed / 2**20:.0f} MiB of disk: {model_bytes / 2**20:.0f} for the model, "
            f"{programs_bytes / 2**20:.0f} for the programs, {REST_BYTES >> 20} for the rest; {target.name} has "
            f"{target.disk_mib}",
            hint="take a smaller quantize.file_type, or write a profile with more disk_mib",
        )


def _check_golden(golden: list[dict[str, Any]], settings: BundleSettings, target: TargetProfile) -> None:
    if not golden:
        raise DataError("no golden prompts: the bundle could not be checked on the device")
    room = settings.context // target.server.parallel
    for number, prompt in enumerate(golden):
        if len(prompt["prompt_ids"]) >= room:
            raise DataError(
                f"golden prompt {number} has {len(prompt['prompt_ids'])} tokens, a slot of the server holds {room}",
                hint="raise bundle.context",
            )


def _model_facts(
    facts: "GgufFacts",
    settings: BundleSettings,
    target: TargetProfile,
    quantize_facts: dict[str, Any],
) -> dict[str, Any]:
    return {
        "bytes": facts.file_bytes,
        "architecture": facts.architecture,
        "parameters": facts.parameters,
        "file_type": facts.file_type,
        "bits_per_weight": facts.bits_per_weight,
        "bytes_per_token": _bytes_per_token(facts),
        "tensor_types": facts.tensor_types,
        "quantize": quantize_facts,
        "context": settings.context,
        "context_trained": facts.context_length,
        "parallel": target.server.parallel,
        "chat_template_sha256": facts.chat_template_sha256,
        "bos": None if facts.bos_id is None else {"id": facts.bos_id, "text": facts.bos_token},
        "eos": {"id": facts.eos_id, "text": facts.eos_token},
    }


def _place(source: Path, target: Path, *, expected: str | None) -> str:
    """The model, without a second copy where the file system can share it; read once. Its SHA-256, in hex.

    Raises ArtifactError when that is not the `expected` one, HostError when the disk is full.
    """
    target.parent.mkdir(parents=True)
    source = source.resolve()
    linked = stat.S_IMODE(source.stat().st_mode) == _FILE_MODE and _link(source, target)
    digest = hashlib.sha256()
    try:
        with source.open("rb") as file, nullcontext() if linked else target.open("wb") as copy:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                if copy is not None:
                    copy.write(block)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HostError(
                f"{target.parent}: no space left for the model, {source.stat().st_size / 2**20:.0f} MiB",
                hint="free some space, then run again",
            ) from error
        raise
    if not linked:
        target.chmod(_FILE_MODE)
    if expected is not None and digest.hexdigest() != expected:
        raise ArtifactError(
            f"{source}: its bytes have changed since it was made",
            hint=f"remove {source.parent} and run the stage again",
        )
    return digest.hexdigest()


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False  # another file system, or one without links
    return True


def _copy_device(folder: Path) -> None:
    """edgectl and the package it calls."""
    for source in sorted(_DEVICE.glob("*.py")):
        entry = source.name == _ENTRY
        destination = folder / "edgectl" if entry else folder / "device" / source.name
        _write(destination, source.read_text(encoding="utf-8"), _PROGRAM_MODE if entry else _FILE_MODE)


def _write_web(folder: Path, settings: BundleSettings) -> None:
    """The chat page, and beside it the system message: unlike the page, that one is shown only to who has the key."""
    _write(folder / "index.html", (_DEVICE / "web" / "index.html").read_text(encoding="utf-8"))
    _write(folder / "system.txt", settings.system or "")


def _write_licences(folder: Path, llama: "LlamaCpp") -> None:
    _write(folder / "llama.cpp.txt", llama.licence.read_text(encoding="utf-8"))
    for source in sorted((llama.licence.parent / "licenses").glob("LICENSE-*")):
        _write(folder / f"llama.cpp-{source.name.removeprefix('LICENSE-')}.txt", source.read_text(encoding="utf-8"))
    for source in sorted(resource("licences").glob("*.txt")):
        _write(folder / f"llama.cpp-{source.name}", source.read_text(encoding="utf-8"))
    _write(folder / "gcc-runtime.txt", _GCC_NOTE)
    own = _own_licence()
    if own is not None:
        _write(folder / "toolchain.txt", own)


def _own_licence() -> str | None:
    """Ours: at the top of a checkout, or in the metadata of an installed package."""
    path = resource("LICENSE")
    if path.is_file():
        return path.read_text(encoding="utf-8")
    try:
        found = importlib.metadata.files("toolchain") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((file.read_text("utf-8") for file in found if file.name == "LICENSE"), None)


def _hashed(folder: Path, *, known: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every file so far: digest, size, mode. What is `known` is not read again."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name, status = path.relative_to(folder).as_posix(), path.stat()
            digest = known.get(name) or layout.sha256(path)
            found[name] = {"sha256": digest, "bytes": status.st_size, "mode": f"{stat.S_IMODE(status.st_mode):04o}"}
    return found


def _write(path: Path, text: str, mode: int = _FILE_MODE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    path.chmod(mode)


def _json(content: object) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _write_json(path: Path, content: object) -> None:
    _write(path, _json(content))
