"""Commit by rename, manifests, digests, the lock."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from toolchain import artifact
from toolchain.artifact import Artifact, Digests, Order, clean_partial, commit, lock, open_artifact, partial_of
from toolchain.errors import ArtifactError, HostError

ORDER = Order("distill", 1, {"epochs": 3}, {"rows": "ab" * 32})


def make(final: Path, files: dict[str, str], order: Order = ORDER) -> Artifact:
    partial, _ = clean_partial(final)
    for name, text in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(text)
    return commit(final, order, metrics={"loss": 1.5}, started_s=time.time(), tools={"python": "3"})


def test_a_committed_artifact_opens_with_what_was_put_in(tmp_path: Path) -> None:
    made = make(tmp_path / "a", {"adapter/model": "weights", "log": "x"})
    opened = open_artifact(tmp_path / "a", expect=ORDER.fingerprint, verify=True)
    assert opened.manifest == made.manifest
    assert set(opened.manifest.files) == {"adapter/model", "log"}
    assert opened.manifest.metrics == {"loss": 1.5}
    assert not partial_of(tmp_path / "a").exists()


def test_what_a_library_wrote_for_its_owner_alone_is_read_as_every_other_file(tmp_path: Path) -> None:
    users = tmp_path / "of the user"
    users.write_text("not ours to open up")
    users.chmod(0o600)
    partial, _ = clean_partial(tmp_path / "a")
    (partial / "model.safetensors").write_text("weights")
    (partial / "model.safetensors").chmod(0o600)
    (partial / "linked").hardlink_to(users)
    before = os.umask(0o027)
    try:
        commit(tmp_path / "a", ORDER, metrics={}, started_s=time.time(), tools={})
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert users.stat().st_mode & 0o777 == 0o600


def test_equal_files_have_equal_digests_whatever_was_asked_for(tmp_path: Path) -> None:
    one = make(tmp_path / "a", {"f": "same"})
    other = make(tmp_path / "b", {"f": "same"}, Order("distill", 2, {"epochs": 9}, {}))
    assert one.digest == other.digest
    assert one.manifest.fingerprint != other.manifest.fingerprint
    assert make(tmp_path / "c", {"f": "else"}).digest != one.digest
    assert make(tmp_path / "d", {"g": "same"}).digest != one.digest


def test_a_reference_counts_as_the_content_it_refers_to(tmp_path: Path) -> None:
    order = Order("teacher", 1, {}, {"model": "cd" * 32})
    here = make(tmp_path / "a", {"reference.json": '{"path": "/one"}'}, order)
    there = make(tmp_path / "b", {"reference.json": '{"path": "/two"}'}, order)
    assert here.digest == there.digest == "cd" * 32


@pytest.mark.parametrize("part", ["stage", "version", "settings", "inputs"])
def test_the_fingerprint_covers_every_part_of_the_order(part: str) -> None:
    changed = {
        "stage": Order("merge", 1, {"epochs": 3}, ORDER.inputs),
        "version": Order("distill", 2, {"epochs": 3}, ORDER.inputs),
        "settings": Order("distill", 1, {"epochs": 4}, ORDER.inputs),
        "inputs": Order("distill", 1, {"epochs": 3}, {"rows": "ac" * 32}),
    }[part]
    assert changed.fingerprint != ORDER.fingerprint


def test_a_partial_directory_keeps_only_what_can_be_resumed(tmp_path: Path) -> None:
    partial, resumable = clean_partial(tmp_path / "a")
    assert not resumable
    (partial / "resume").mkdir()
    (partial / "resume" / "step-10").write_text("state")
    (partial / "half").write_text("half a file")
    (partial / "folder").mkdir()
    again, resumable = clean_partial(tmp_path / "a")
    assert again == partial
    assert resumable
    assert [path.name for path in partial.iterdir()] == ["resume"]


def test_resume_is_gone_after_the_commit_and_not_in_the_manifest(tmp_path: Path) -> None:
    partial, _ = clean_partial(tmp_path / "a")
    (partial / "resume").mkdir()
    (partial / "resume" / "state").write_text("s")
    (partial / "f").write_text("x")
    made = commit(tmp_path / "a", ORDER, metrics={}, started_s=time.time(), tools={})
    assert set(made.manifest.files) == {"f"}
    assert not (tmp_path / "a" / "resume").exists()


def test_a_stage_that_left_nothing_is_not_committed(tmp_path: Path) -> None:
    clean_partial(tmp_path / "a")
    with pytest.raises(ArtifactError, match="left no files"):
        commit(tmp_path / "a", ORDER, metrics={}, started_s=time.time(), tools={})
    assert not (tmp_path / "a").exists()


def test_tampering_is_found_and_the_file_is_named(tmp_path: Path) -> None:
    final = tmp_path / "a"
    make(final, {"model": "weights", "log": "x"})
    (final / "model").write_text("wEights")
    open_artifact(final)
    with pytest.raises(ArtifactError, match=r"model: its bytes have changed"):
        open_artifact(final, verify=True)
    (final / "model").write_text("weights and more")
    with pytest.raises(ArtifactError, match=r"model: has 16 bytes, not 7"):
        open_artifact(final)
    (final / "model").unlink()
    with pytest.raises(ArtifactError, match="model: is missing"):
        open_artifact(final)


def test_a_digest_that_the_stage_took_is_believed_and_a_file_left_to_the_caller_is_not_read(tmp_path: Path) -> None:
    final = tmp_path / "a"
    partial, _ = clean_partial(final)
    for name in ("model", "notes"):
        (partial / name).write_text("weights")
    known = {"model": "0" * 64}
    made = commit(final, ORDER, metrics={}, started_s=time.time(), tools={}, known=known)
    assert made.manifest.files["model"].sha256 == "0" * 64
    assert made.manifest.files["notes"].sha256 == artifact.digest_file(final / "notes")
    with pytest.raises(ArtifactError, match="model: its bytes have changed"):
        open_artifact(final, verify=True)
    open_artifact(final, verify=True, unread=("model",))
    (final / "notes").write_text("WEIGHTS")
    with pytest.raises(ArtifactError, match="notes: its bytes have changed"):
        open_artifact(final, verify=True, unread=("model",))


def test_a_damaged_or_edited_manifest_is_refused(tmp_path: Path) -> None:
    final = tmp_path / "a"
    make(final, {"f": "x"})
    text = (final / "manifest.json").read_text()
    (final / "manifest.json").write_text(text.replace('"epochs": 3', '"epochs": 4'))
    with pytest.raises(ArtifactError, match="fingerprint does not fit"):
        open_artifact(final)
    (final / "manifest.json").write_text(text[:50])
    with pytest.raises(ArtifactError, match="is damaged"):
        open_artifact(final)
    (final / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        open_artifact(final)


def test_an_artifact_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    make(tmp_path / "a", {"f": "x"})
    with pytest.raises(ArtifactError, match="fingerprint"):
        open_artifact(tmp_path / "a", expect="0" * 64)


def test_digests_of_outside_files_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_text("one")
    os.utime(model, (1, 1))
    memo = tmp_path / "memo.json"
    first = Digests(memo).of(model)
    remembered = json.loads(memo.read_text())
    remembered[str(model)][3] = "f" * 64
    memo.write_text(json.dumps(remembered))
    assert Digests(memo).of(model) == "f" * 64
    model.write_text("two")
    assert Digests(memo).of(model) not in ("f" * 64, first)
    memo.write_text("garbage")
    model.write_text("one")
    assert Digests(memo).of(model) == first


def test_the_digest_of_a_folder_covers_names_and_bytes_but_not_hidden_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    digests = Digests(tmp_path / "memo.json")
    plain = digests.of(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("2")
    assert digests.of(folder) == plain
    (folder / "a").rename(folder / "b")
    assert digests.of(folder) != plain


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        Digests(tmp_path / "memo.json").of(tmp_path / "none")


def _hold(work: Path, held: "multiprocessing.synchronize.Event", release: "multiprocessing.synchronize.Event") -> None:
    with lock(work, what="run other.toml"):
        held.set()
        release.wait(30)


def test_a_second_run_in_one_work_folder_is_told_who_holds_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    try:
        assert held.wait(30)
        with (
            pytest.raises(HostError, match=rf"in use by process {other.pid} .*run other\.toml"),
            lock(tmp_path, what=""),
        ):
            pass
    finally:
        release.set()
        other.join()
    with lock(tmp_path, what="run"):
        pass


def test_the_lock_falls_when_its_holder_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    assert held.wait(30)
    other.kill()
    other.join()
    with lock(tmp_path, what="run"):
        pass


def test_a_work_folder_that_cannot_be_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot be used as the work folder"), lock(tmp_path / "file", what="run"):
        pass


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    artifact.write_atomic(target, "old")
    with pytest.raises(TypeError):
        artifact.write_atomic(target, None)  # type: ignore[arg-type]
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
