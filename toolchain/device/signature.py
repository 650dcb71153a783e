"""Who vouches for a bundle: a signature over SHA256SUMS, made and checked by OpenSSH's ssh-keygen.

SHA256SUMS lists the digest of every file, the manifest included, so one signature is for all of them. What has to be
signed is decided outside the bundle, by an option or by a file of the machine: whoever can change a bundle could take a
rule out of it together with the signature. Format: PROTOCOL.sshsig of OpenSSH.
"""

import base64
import binascii
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import DeviceError, UsageError

NAMESPACE = "toolchain-bundle"
"""What the signature is for: one made for git or for a letter does not count."""
MACHINE_POLICY = Path("/etc/edgectl/allowed_signers")
"""Where this file is, every bundle must be signed by one whom it names, without any option."""
_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_ARMOR_WIDTH = 70
LIMIT_BYTES = 1 << 20
"""No signature is longer."""


@dataclass(frozen=True)
class Policy:
    """Whose signature is required."""

    allowed_signers: Path
    """ALLOWED SIGNERS file as in ssh-keygen(1)."""
    signer: str | None
    """Only this one of them; None: any."""


@dataclass(frozen=True)
class Verdict:
    """What a signature was found to be."""

    ok: bool
    detail: str


def policy(allowed_signers: Path | None, signer: str | None) -> Policy | None:
    """What was asked for, else the machine's own file where there is one; None: no signature is required.

    Raises UsageError for a file that is not there, or a signer without a file; DeviceError when it cannot be told
    whether the machine has one.
    """
    if allowed_signers is not None:
        try:
            allowed_signers.read_bytes()
        except OSError as error:
            raise UsageError(
                f"--allowed-signers {allowed_signers}: {error.strerror}",
                hint="a line for each who may sign: NAME, then the public key; see ssh-keygen(1), ALLOWED SIGNERS",
            ) from None
        return Policy(allowed_signers, signer)
    try:
        MACHINE_POLICY.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if signer is not None:
            raise UsageError(
                f"--signer {signer}: nothing says which key that is", hint="give --allowed-signers as well"
            ) from None
        return None
    except OSError as error:
        raise DeviceError(f"{MACHINE_POLICY}: cannot be looked at: {error.strerror}", hint="run as root") from None
    return Policy(MACHINE_POLICY, signer)


def check(sums: bytes, signature: bytes | None, required: Policy | None) -> Verdict:
    """Hold `signature` (None: there is none) over `sums`, the bytes of SHA256SUMS, against what is required."""
    if signature is None:
        if required is None:
            return Verdict(True, "unsigned, and nothing here requires a signature")
        return Verdict(False, f"unsigned, and {required.allowed_signers} says who must sign")
    if not _is_canonical(signature):
        return Verdict(False, "damaged: not a signature as ssh-keygen writes it")
    try:
        return _check(sums, signature, required)
    except FileNotFoundError:
        if required is None:
            return Verdict(True, "signed, not checked: no ssh-keygen on this machine")
        return Verdict(False, "cannot be checked: no ssh-keygen on this machine: apt-get install openssh-client")


def _check(sums: bytes, signature: bytes, required: Policy | None) -> Verdict:
    whole, said = _ssh_keygen(["check-novalidate"], sums, signature)
    if not whole:
        return Verdict(False, f"wrong signature: it is not for this {NAMESPACE}'s SHA256SUMS ({said})")
    key = said.rpartition(" with ")[2]
    if required is None:
        return Verdict(True, f"signed with {key}; nobody was named who may sign (--allowed-signers)")
    found, said = _ssh_keygen(["find-principals", "-f", str(required.allowed_signers)], sums, signature)
    names = [required.signer] if required.signer is not None else said.splitlines() if found else []
    for name in names:
        good, said = _ssh_keygen(["verify", "-f", str(required.allowed_signers), "-I", name], sums, signature)
        if good:
            return Verdict(True, f"signed by {name} with {key}")
    wanted = f"not that of {required.signer} in" if required.signer is not None else "not one of"
    # An expired key, another namespace, a line that is none.
    reasons = [line for line in said.splitlines() if line.startswith(f"{required.allowed_signers}:")]
    because = f" ({reasons[0]})" if reasons else ""
    return Verdict(False, f"unknown signer: signed with {key}, {wanted} {required.allowed_signers}{because}")


def _ssh_keygen(arguments: list[str], sums: bytes, signature: bytes) -> tuple[bool, str]:
    """Whether it was content, and what it said. The signature lies in memory: the root may be read-only."""
    handle = os.memfd_create("signature")
    try:
        os.write(handle, signature)
        argv = ["ssh-keygen", "-Y", *arguments, "-s", f"/proc/self/fd/{handle}"]
        if arguments[0] != "find-principals":
            argv += ["-n", NAMESPACE]
        done = subprocess.run(argv, input=sums, capture_output=True, check=False, pass_fds=[handle])
    finally:
        os.close(handle)
    said = done.stdout if done.returncode == 0 else done.stderr or done.stdout
    return done.returncode == 0, said.decode(errors="replace").strip()


def _is_canonical(signature: bytes) -> bool:
    """Whether the armor is as ssh-keygen writes it: base64 can say one thing in several ways, and a bit that was
    changed shall be noticed even where it does not matter."""
    lines = signature.decode("ascii", errors="replace").split("\n")
    if len(lines) < 4 or lines[0] != _BEGIN or lines[-2:] != [_END, ""]:
        return False
    try:
        content = base64.b64decode("".join(lines[1:-2]), validate=True)
    except (binascii.Error, ValueError):
        return False
    text = base64.b64encode(content).decode()
    wrapped = [text[at : at + _ARMOR_WIDTH] for at in range(0, len(text), _ARMOR_WIDTH)]
    return wrapped == lines[1:-2]
