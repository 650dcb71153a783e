"""Sign a finished bundle, and verify one: on this host, by the very code that the device runs."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.device import errors, files, place, signature, unpack, verify
from toolchain.errors import ArtifactError, ExternalToolError, HostError, RecipeError
from toolchain.reporter import Reporter


@contextmanager
def as_ours() -> Iterator[None]:
    """The device code's failures as the toolchain's own, which the command line prints."""
    try:
        yield
    except errors.UsageError as error:
        raise RecipeError(error.message, hint=error.hint) from error
    except errors.DeviceError as error:
        raise ArtifactError(error.message, hint=error.hint) from error


def open_whole(folder: Path, *, read: bool) -> files.Bundle:
    """The bundle in `folder`, once nothing is missing, changed or unlisted in it; `read` hashes its files as well.

    Raises ArtifactError that names the files that do not fit.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder", hint="give the folder of a bundle, which holds manifest.json")
    with as_ours():
        bundle = files.open_bundle(folder)
        found = files.problems(bundle, read=read)
    if found:
        raise ArtifactError(f"{folder}: not the bundle that was built: " + "; ".join(found), hint="build it again")
    return bundle


def sign(folder: Path, *, key: Path) -> str:
    """Write folder/SHA256SUMS.sig with an OpenSSH `key`: a private one, or the public one of a key in ssh-agent.

    The bundle is read first: what is signed is what was built. Returns what ssh-keygen says of the signature. Raises
    ArtifactError, HostError, ExternalToolError.
    """
    if not key.is_file():
        hint = "--key is an OpenSSH key such as ~/.ssh/id_ed25519; `ssh-keygen -t ed25519` makes one"
        raise HostError(f"{key}: no such key", hint=hint)
    if shutil.which("ssh-keygen") is None:
        raise HostError("no ssh-keygen on this machine", hint="apt-get install openssh-client")
    open_whole(folder, read=True)
    sums = (folder / files.SUMS).read_bytes()
    argv = ["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", signature.NAMESPACE]
    done = subprocess.run(argv, input=sums, capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        hint = "its passphrase is asked for on a terminal; elsewhere, put the key into ssh-agent and give its .pub file"
        raise ExternalToolError(f"ssh-keygen did not sign with {key}: {said[-1]}", hint=hint)
    verdict = signature.check(sums, done.stdout, None)
    if not verdict.ok:
        raise ExternalToolError(f"ssh-keygen signed with {key}, and does not accept it: {verdict.detail}")
    try:
        place.replace(folder / files.SIGNATURE, done.stdout.decode("ascii"))
    except OSError as error:
        raise HostError(f"{folder / files.SIGNATURE}: cannot be written: {error.strerror}") from error
    return verdict.detail.partition(";")[0]


def check(bundle: Path, *, allowed_signers: Path | None, signer: str | None, report: Reporter) -> dict[str, Any]:
    """The checks that `./edgectl verify` makes of a folder, but for those of the machine; or `unpack` of an archive.

    Raises ArtifactError, RecipeError.
    """
    if not bundle.exists():
        raise ArtifactError(f"{bundle}: no such file or folder", hint="give a bundle's folder, or its archive")
    with as_ours():
        required = signature.policy(allowed_signers, signer)
        if bundle.is_dir():
            return verify.run(bundle, report.line, required=required, host=False)
        head = unpack.check(bundle, required=required)
        checks = [
            verify.check("signature", head.verdict.ok, head.verdict.detail),
            verify.check("files", True, f"{len(head.manifest['files']) + 2} files as built"),
        ]
        return verify.report(head.manifest["bundle_id"], checks)
