"""Is this the bundle that was built, and can this machine run it? A list of named checks."""

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import files, probe, processor, signature
from .errors import DeviceError
from .facts import FactError
from .system import HERE, System

Check = dict[str, Any]
"""{"name": str, "ok": bool, "detail": str}"""


def check(name: str, ok: bool, detail: str) -> Check:
    return {"name": name, "ok": ok, "detail": detail}


def file_check(bundle: files.Bundle) -> Check:
    """Every file is there, unchanged, and nothing else is."""
    found = files.problems(bundle)
    count = len(bundle.manifest["files"]) + 2
    return check("files", not found, "; ".join(found) or f"{count} files as built")


def host_checks(bundle: files.Bundle, system: System = HERE) -> list[Check]:
    """The machine has what the programs and the model need."""
    target, runtime = bundle.manifest["target"], bundle.manifest["runtime"]
    arch = platform.machine()
    checks = [
        check("architecture", arch == target["arch"], f"this machine is {arch}, the bundle is for {target['arch']}")
    ]
    checks.append(_instruction_check(bundle, system))
    checks.append(_glibc_check(str(runtime["glibc_needed"])))
    page, alignment = os.sysconf("SC_PAGE_SIZE"), int(runtime["segment_alignment"])
    checks.append(check("page size", page <= alignment, f"{page} bytes here, programs are aligned to {alignment}"))
    if runtime["device_libraries"]:
        checks.append(_libraries_check(runtime["device_libraries"]))
    checks.append(_memory_check(bundle.wanted_bytes, system))
    return checks


def _instruction_check(bundle: files.Bundle, system: System) -> Check:
    try:
        needed, missing = processor.needed_and_missing(bundle.manifest, system)
    except FactError as error:
        return check("instruction set", True, f"not known: {error.reason}")  # nothing is refused for a guess
    return check("instruction set", not missing, processor.lacks(needed, missing) if missing else ", ".join(needed))


def _memory_check(wanted: int, system: System) -> Check:
    try:
        memory = probe.memory_granted_bytes(system)
    except DeviceError as error:
        return check("memory", False, f"not known: {error.message}")
    detail = f"{memory >> 20} MiB here, {wanted >> 20} MiB are needed for the model, its context and the server"
    return check("memory", memory >= wanted, detail)


def _glibc_check(needed: str) -> Check:
    if needed == "none":
        return check("glibc", True, "the programs carry their own C library")
    have = probe.glibc()
    enough = have is not None and have >= tuple(int(part) for part in needed.split("."))
    shown = f"glibc {have[0]}.{have[1]}" if have else "no glibc"
    return check("glibc", enough, f"{shown} here, at least {needed} is needed")


def _libraries_check(names: list[str]) -> Check:
    """What the programs take from the system is there, found as they will find it."""
    missing = []
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    detail = f"missing: {', '.join(missing)}" if missing else f"{len(names)} of the system's are there"
    return check("libraries", not missing, detail)


def signature_check(root: Path, required: signature.Policy | None) -> Check:
    """The bundle is signed as is required here. Raises DeviceError when there is no SHA256SUMS to be signed."""
    sums = files.read_small(root / files.SUMS, files.JSON_LIMIT_BYTES)
    if sums is None:
        raise DeviceError(f"no {files.SUMS} in {root}", hint="this is not a whole bundle: copy the bundle again")
    signed = files.read_small(root / files.SIGNATURE, signature.LIMIT_BYTES)
    verdict = signature.check(sums, signed, required)
    return check("signature", verdict.ok, verdict.detail)


def report(bundle_id: str | None, checks: list[Check]) -> dict[str, Any]:
    """The checks as a record; the id is None for a bundle that was not looked into."""
    return {"schema_version": 1, "bundle": bundle_id, "ok": all(item["ok"] for item in checks), "checks": checks}


def run(
    root: Path, say: Callable[[str], None], *, required: signature.Policy | None, host: bool = True
) -> dict[str, Any]:
    """Signature, then files, then (`host`) the machine, as far as all is right.

    What comes with a wrong signature is not looked into. Raises DeviceError for what is no bundle.
    """
    signed = signature_check(root, required)
    if not signed["ok"]:
        return report(None, [signed])
    bundle = files.open_bundle(root)
    say("hashing every file")
    whole = file_check(bundle)
    return report(bundle.id, [signed, whole, *(host_checks(bundle) if host and whole["ok"] else [])])
