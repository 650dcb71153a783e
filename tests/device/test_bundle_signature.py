"""Who vouches for a bundle: signing it with an OpenSSH key, and every way in which a signature can be wrong."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.device.bundles import edgectl, toolchain
from toolchain.bundle import seal
from toolchain.device import files, signature
from toolchain.device.errors import UsageError
from toolchain.errors import ArtifactError, ExternalToolError, HostError

pytestmark = pytest.mark.device
SIGNER = "builder@example.org"


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "a key", "-f", path], check=True)
    return path


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("key") / "id_ed25519")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("stranger") / "id_ed25519")


def allow(path: Path, **signers: Path) -> Path:
    lines = [f"{name}@example.org {key.with_suffix('.pub').read_text()}" for name, key in signers.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def allowed(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return allow(tmp_path_factory.mktemp("allowed") / "allowed_signers", builder=key)


def verdict(bundle: Path, *options: str, path: str = "/usr/bin:/bin") -> tuple[bool, str]:
    """What `./edgectl verify` says of the signature; with a wrong one it looks no further."""
    done = edgectl(bundle, "verify", "--json", *options, path=path)
    assert done.stderr == "" or done.stderr.startswith("hashing"), done.stderr
    checks = {item["name"]: item for item in json.loads(done.stdout)["checks"]}
    found = checks["signature"]
    if not found["ok"]:
        assert done.returncode == 1
        assert set(checks) == {"signature"}
    else:
        assert checks["files"]["ok"] == (done.returncode == 0)
    return bool(found["ok"]), str(found["detail"])


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_signed_bundle_is_whole_and_names_its_signer(bundle: Path, kind: str, tmp_path: Path) -> None:
    key = make_key(tmp_path / kind, kind)
    signed = toolchain("sign", str(bundle), "--key", str(key))
    assert signed.returncode == 0, signed.stderr
    assert signed.stdout.startswith(f"signed with {kind.upper()} key SHA256:")
    names = allow(tmp_path / "names", builder=key)
    ok, detail = verdict(bundle, "--allowed-signers", str(names), "--signer", SIGNER)
    assert ok
    assert detail.startswith(f"signed by {SIGNER} with {kind.upper()} key SHA256:")
    assert toolchain("verify", str(bundle), "--allowed-signers", str(names)).returncode == 0


def test_the_key_may_come_from_the_environment_and_from_an_agent(bundle: Path, key: Path, tmp_path: Path) -> None:
    assert toolchain("sign", str(bundle), TOOLCHAIN_SIGNING_KEY=str(key)).returncode == 0
    locked = make_key(tmp_path / "locked", passphrase="a secret")
    agent = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", agent], stdout=subprocess.DEVNULL) as running:
        try:
            while not agent.exists():
                assert running.poll() is None
            ask = tmp_path / "ask"
            ask.write_text("#!/bin/sh\necho 'a secret'\n")
            ask.chmod(0o755)
            environment = {
                "SSH_AUTH_SOCK": str(agent),
                "SSH_ASKPASS": str(ask),
                "SSH_ASKPASS_REQUIRE": "force",
                "PATH": "/usr/bin:/bin",
            }
            subprocess.run(["ssh-add", "-q", locked], env=environment, check=True, stdin=subprocess.DEVNULL)
            done = toolchain("sign", str(bundle), "--key", f"{locked}.pub", SSH_AUTH_SOCK=str(agent))
        finally:
            running.terminate()
    assert done.returncode == 0, done.stderr
    names = allow(tmp_path / "names", builder=locked)
    assert verdict(bundle, "--allowed-signers", str(names))[0]


def test_an_unsigned_bundle_is_refused_where_a_signature_is_required(bundle: Path, allowed: Path) -> None:
    assert verdict(bundle) == (True, "unsigned, and nothing here requires a signature")
    assert verdict(bundle, "--allowed-signers", str(allowed)) == (False, f"unsigned, and {allowed} says who must sign")


def test_taking_the_signature_away_does_not_help(bundle: Path, key: Path, allowed: Path) -> None:
    seal.sign(bundle, key=key)
    assert verdict(bundle, "--allowed-signers", str(allowed))[0]
    (bundle / files.SIGNATURE).unlink()
    assert not verdict(bundle, "--allowed-signers", str(allowed))[0]


def test_the_machines_own_file_makes_a_signature_required_without_any_option(
    bundle: Path, key: Path, stranger: Path, allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature, "MACHINE_POLICY", allowed)
    required = signature.policy(None, None)
    assert required == signature.Policy(allowed, None)
    sums = (bundle / files.SUMS).read_bytes()
    assert not signature.check(sums, None, required).ok
    seal.sign(bundle, key=stranger)
    assert not signature.check(sums, (bundle / files.SIGNATURE).read_bytes(), required).ok
    seal.sign(bundle, key=key)
    assert signature.check(sums, (bundle / files.SIGNATURE).read_bytes(), required).ok


def test_a_strangers_signature_is_told_from_a_wrong_one(bundle: Path, key: Path, stranger: Path, allowed: Path) -> None:
    seal.sign(bundle, key=stranger)
    ok, detail = verdict(bundle, "--allowed-signers", str(allowed))
    assert not ok
    assert detail.startswith("unknown signer: signed with ED25519 key SHA256:")
    assert str(allowed) in detail
    seal.sign(bundle, key=key)
    with (bundle / files.SUMS).open("a") as sums:
        sums.write("0" * 64 + "  more\n")
    ok, detail = verdict(bundle, "--allowed-signers", str(allowed))
    assert not ok
    assert detail.startswith("wrong signature: ")


def test_another_of_the_allowed_signers_is_not_the_one_asked_for(
    bundle: Path, key: Path, stranger: Path, tmp_path: Path
) -> None:
    names = allow(tmp_path / "names", builder=key, other=stranger)
    seal.sign(bundle, key=stranger)
    assert verdict(bundle, "--allowed-signers", str(names))[0]
    ok, detail = verdict(bundle, "--allowed-signers", str(names), "--signer", SIGNER)
    assert not ok
    assert f"not that of {SIGNER}" in detail


def test_a_signature_made_for_another_purpose_does_not_count(bundle: Path, key: Path, allowed: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", "git", bundle / files.SUMS], check=True)
    ok, detail = verdict(bundle, "--allowed-signers", str(allowed))
    assert not ok
    assert "wrong signature" in detail


@pytest.mark.parametrize(
    ("before_key", "says"),
    [
        ('valid-before="20200101" ', "key has expired"),
        ('namespaces="git" ', "not permitted for use in signature namespace"),
        ("none-of-it ", "unknown key option"),
    ],
)
def test_a_key_that_does_not_count_is_told_from_a_strangers(
    bundle: Path, key: Path, before_key: str, says: str, tmp_path: Path
) -> None:
    seal.sign(bundle, key=key)
    names = tmp_path / "names"
    names.write_text(f"{SIGNER} {before_key}{key.with_suffix('.pub').read_text()}")
    for options in ([], ["--signer", SIGNER]):
        ok, detail = verdict(bundle, "--allowed-signers", str(names), *options)
        assert not ok
        assert f"({names}:1: " in detail
        assert says in detail


def test_without_ssh_keygen_a_required_signature_fails_and_another_is_said_to_be_unchecked(
    bundle: Path, key: Path, allowed: Path, tmp_path: Path
) -> None:
    seal.sign(bundle, key=key)
    nothing = str(tmp_path / "no programs")
    ok, detail = verdict(bundle, "--allowed-signers", str(allowed), path=nothing)
    assert not ok
    assert "no ssh-keygen on this machine: apt-get install openssh-client" in detail
    assert verdict(bundle, path=nothing) == (True, "signed, not checked: no ssh-keygen on this machine")


def test_a_signer_without_a_file_and_a_file_that_is_not_there_are_refused(bundle: Path, tmp_path: Path) -> None:
    for options in (["--signer", SIGNER], ["--allowed-signers", str(tmp_path / "none")], ["--allowed-signers", "/"]):
        done = edgectl(bundle, "verify", *options)
        assert done.returncode == 2
        assert done.stderr.startswith("error: --")
        assert "hint: " in done.stderr
    with pytest.raises(UsageError, match="nothing says which key that is"):
        signature.policy(None, SIGNER)


def test_a_bundle_that_was_changed_is_not_signed(bundle: Path, key: Path) -> None:
    (bundle / "Modelfile").write_text("FROM elsewhere\n")
    with pytest.raises(ArtifactError, match="Modelfile: changed"):
        seal.sign(bundle, key=key)
    assert not (bundle / files.SIGNATURE).exists()


def test_signing_says_what_is_wrong_with_the_key(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no such key"):
        seal.sign(bundle, key=tmp_path / "none")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "text").chmod(0o600)
    with pytest.raises(ExternalToolError, match="ssh-keygen did not sign with"):
        seal.sign(bundle, key=tmp_path / "text")
    assert not (bundle / files.SIGNATURE).exists()


def test_one_flipped_byte_is_noticed_wherever_it_is(bundle: Path, key: Path, allowed: Path) -> None:
    """One byte of each file, and every byte of those that say what the others must be."""
    seal.sign(bundle, key=key)
    everything = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    assert len(everything) > 15
    required = signature.Policy(allowed, None)
    swept = 0
    for path in everything:
        content = path.read_bytes()
        name = path.relative_to(bundle).as_posix()
        step = 1 if name == files.SIGNATURE else max(1, len(content) // (8 if len(content) < 100_000 else 2))
        for at in range(0, len(content), step):
            changed = bytearray(content)
            changed[at] ^= 1 << (at % 8)
            _write(path, bytes(changed))
            assert not _is_whole(bundle, required), f"{name}: byte {at} may change unseen"
            swept += 1
        _write(path, content)
    assert swept > 300
    assert _is_whole(bundle, required)


def _write(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode
    path.unlink()  # it may be a hard link to the source
    path.write_bytes(content)
    path.chmod(mode)


def _is_whole(bundle: Path, required: signature.Policy | None) -> bool:
    from toolchain.device import verify
    from toolchain.device.errors import DeviceError

    try:
        return bool(verify.run(bundle, lambda _: None, required=required, host=False)["ok"])
    except DeviceError:
        return False


def test_without_a_policy_a_flipped_byte_is_noticed_as_well(bundle: Path, key: Path) -> None:
    seal.sign(bundle, key=key)
    path = bundle / files.SIGNATURE
    content = path.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << (at % 7)
        path.write_bytes(bytes(changed))
        assert not _is_whole(bundle, None), f"byte {at} may change unseen"
    path.write_bytes(content)
    assert _is_whole(bundle, None)
