"""Making a bundle and noticing what was changed in it. Its programs are this system's `true`."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.device import bundles, tiny_chat
from tests.device.bundles import Make, edgectl, every_byte, target
from toolchain.bundle import build
from toolchain.bundle.manifest import BundleManifest
from toolchain.device import files, serve, verify
from toolchain.errors import ArtifactError, DataError, HostError, ModelError
from toolchain.gguf import llama_cpp
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.resources import resource, versions

pytestmark = pytest.mark.device


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_gguf(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def llama(tmp_path: Path) -> LlamaCpp:
    return bundles.install(tmp_path / "llama.cpp")


@pytest.fixture
def make(llama: LlamaCpp, model: Path, tmp_path: Path) -> Make:
    return bundles.maker(llama, model, tmp_path)


def test_the_same_inputs_give_the_same_bytes(make: Make) -> None:
    first, second = every_byte(make("first")), every_byte(make("second"))
    assert {"manifest.json", "SHA256SUMS", "MODEL_CARD.md", "edgectl", "device/cli.py"} <= set(first)
    assert first == second


def test_serve_starts_the_programs_before_it_loads_what_comes_after(make: Make) -> None:
    folder = make()
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from device import launch; "
        f"started = launch.launch({str(folder)!r}, ['serve', '--port', '{serve.free_port()}', '--home', '/nowhere']); "
        "print(*sys.modules); sys.exit(started.child.wait())"
    )
    argv = [sys.executable, "-I", "-S", "-B", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"argparse", "json", "pathlib", "re", "socket", "subprocess", "threading"}


def test_edgectl_is_started_by_any_shell_without_packages_and_settings(make: Make, tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('not isolated')")
    (tmp_path / "a link").symlink_to(make() / "edgectl")
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([tmp_path / "a link", "info"], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tiny 1.0 for x86-cpu" in done.stdout


@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        ("./edgectl info --json >/dev/full", 1, "", "error: the output cannot be written: No space left on device"),
        ("./edgectl verify --json 2>&-", 0, '{\n  "schema_version": 1,', ""),
        ("./edgectl verify 2>&1 >&-", 0, "hashing every file", ""),
        ("XDG_DATA_HOME=/tmp/50%off ./edgectl install --help", 0, "usage: ", ""),
        ("echo k > ../k; ./edgectl serve --api-key-file ../k --host " + 70 * "\u00fc", 2, "", "error: --host "),
        ("./edgectl bench --out /proc/none", 2, "", "error: --out /proc/none: cannot be written"),
        ("./edgectl bench --out ..", 2, "", "error: --out ..: cannot be written"),
        ("exec nohup ./edgectl info", 0, "bundle ", ""),
    ],
)
def test_odd_surroundings_end_in_one_line(make: Make, command: str, code: int, out: str, err: str) -> None:
    environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["sh", "-c", command], cwd=make(), env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[: len(out)]) == (code, out), done.stderr
    assert done.stderr.startswith(err) if err else done.stderr == ""
    assert "Traceback" not in done.stderr


def test_a_hangup_that_is_ignored_stays_so(make: Make) -> None:
    code = "import signal; from device import main; main._heed_signals(); print(signal.getsignal(signal.SIGHUP).name)"
    argv = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=make(), capture_output=True, text=True, check=True)
    assert done.stdout == "SIG_IGN\n"


def test_the_id_changes_with_a_file_and_with_a_fact(make: Make) -> None:
    ids = {
        files.open_bundle(make("a")).id,
        files.open_bundle(make("b", golden=tiny_chat.golden()[:1])).id,
        files.open_bundle(make("c", ledger=None)).id,
        files.open_bundle(make("d", settings=build.BundleSettings(name="tiny", version="1.1", context=512))).id,
    }
    assert len(ids) == 4


def test_the_manifest_tells_what_the_model_is_and_names_no_place_on_this_machine(make: Make, tmp_path: Path) -> None:
    folder = make()
    manifest = json.loads((folder / "manifest.json").read_text())
    model = manifest["model"]
    assert model["file"] == "model/tiny-v1.0-F32.gguf"
    assert model["bits_per_weight"] == 32
    assert model["tensor_types"] == {"F32": 12}
    assert model["eos"] == {"id": tiny_chat.token_id("<|fin|>"), "text": "<|fin|>"}
    assert manifest["files"][model["file"]]["sha256"] == model["sha256"] == files.sha256(folder / model["file"])
    texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".txt")]
    assert len(texts) >= 6
    assert not any(str(tmp_path) in text for text in texts)


def test_sha256sum_accepts_a_bundle_without_our_code(make: Make) -> None:
    folder = make()
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(every_byte(folder)) - {"SHA256SUMS"}


def _append(folder: Path) -> str:
    with (folder / "presets.json").open("a") as file:
        file.write(" ")
    return "presets.json: changed: "


def _same_size(folder: Path) -> str:
    path = folder / "model" / "tiny-v1.0-F32.gguf"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # it may be a hard link to the source
    path.write_bytes(content)
    return "model/tiny-v1.0-F32.gguf: changed: SHA-256 differs"


def _missing(folder: Path) -> str:
    (folder / "eval" / "golden.json").unlink()
    return "eval/golden.json: missing"


def _extra(folder: Path) -> str:
    (folder / "runtime" / "bin" / "libggml-cpu-evil.so").write_bytes(b"")
    return "runtime/bin/libggml-cpu-evil.so: extra"


def _link(folder: Path) -> str:
    (folder / "MODEL_CARD.md").rename(folder.parent / "card")
    (folder / "MODEL_CARD.md").symlink_to(folder.parent / "card")
    return "MODEL_CARD.md: is a link"


def _folder_link(folder: Path) -> str:
    (folder / "LICENSES").rename(folder.parent / "texts")
    (folder / "LICENSES").symlink_to(folder.parent / "texts")
    return "LICENSES: is a link"


def _manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["quality"]["gain"]["after"] = 0.001
    path.write_text(json.dumps(manifest))
    return "manifest.json: changed"


def _sums(folder: Path) -> str:
    (folder / "SHA256SUMS").write_text("")
    return "SHA256SUMS: changed"


def _not_executable(folder: Path) -> str:
    (folder / "runtime" / "bin" / "llama-server").chmod(0o644)
    return "runtime/bin/llama-server: not executable"


CHANGES = [_append, _same_size, _missing, _extra, _link, _folder_link, _manifest, _sums, _not_executable]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_verify_names_what_was_changed(make: Make, change: Callable[[Path], str]) -> None:
    folder = make()
    assert files.problems(files.open_bundle(folder)) == []
    expected = change(folder)
    found = files.problems(files.open_bundle(folder))
    assert any(problem.startswith(expected) for problem in found), found
    result = edgectl(folder, "verify", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["ok"] is False


def test_a_damaged_manifest_is_one_error_and_a_hint(make: Make) -> None:
    folder = make()
    (folder / "manifest.json").write_text("{")
    result = edgectl(folder, "info")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "is damaged" in result.stderr
    assert "hint: copy the bundle again" in result.stderr


def test_a_bundle_without_a_manifest_says_that_it_is_not_whole(make: Make) -> None:
    folder = make()
    (folder / "manifest.json").unlink()
    result = edgectl(folder, "verify")
    assert result.returncode == 1
    assert "no manifest.json" in result.stderr


def test_a_host_that_is_open_to_the_network_needs_a_key(make: Make) -> None:
    result = edgectl(make(), "serve", "--host", "0.0.0.0")
    assert result.returncode == 2
    assert "there is no API key" in result.stderr
    assert "--api-key-file" in result.stderr


@pytest.mark.parametrize("arguments", [["--port", "0"], ["--port", "x"], ["--api-key-file", "/nowhere"]])
def test_a_wrong_option_of_serve_exits_with_2(make: Make, arguments: list[str]) -> None:
    result = edgectl(make(), "serve", *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_info_says_what_is_in_the_bundle_and_what_the_machine_is(make: Make) -> None:
    record = json.loads(edgectl(make(), "info", "--json").stdout)
    assert record["bundle"]["name"] == "tiny"
    assert record["device"]["logical_cpus"] == len(os.sched_getaffinity(0))
    assert record["threads"] >= 1


def test_a_truncated_gguf_is_refused_with_one_clear_error(make: Make, model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="cut short"):
        make(gguf=cut)


def test_a_file_that_is_no_gguf_is_refused(make: Make, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"hello" * 100)
    with pytest.raises(ModelError, match="not a GGUF"):
        make(gguf=other)


def test_a_model_that_does_not_fit_the_boards_memory_is_refused_with_what_takes_it(make: Make) -> None:
    board = target().model_copy(update={"memory_mib": 259})
    with pytest.raises(
        ModelError, match=r"needs 259 MiB on the device: 2 for the weights, 1 for a context of 1024 tok"
    ):
        make(target=board, settings=build.BundleSettings(name="tiny", version="1.0", context=1024))
    make("fits", target=board, settings=build.BundleSettings(name="tiny", version="1.0", context=128))


def test_a_bundle_that_does_not_fit_the_boards_disk_is_refused_with_what_takes_it(make: Make) -> None:
    board = target().model_copy(update={"disk_mib": 64})
    folder = make(target=board)
    files_bytes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    rest = [size for path, size in files_bytes.items() if path.parent.name not in ("model", "bin")]
    assert sum(rest) < build.REST_BYTES
    small = board.model_copy(update={"disk_mib": 3})
    with pytest.raises(
        ModelError,
        match=r"takes 4 MiB of disk: 2 for the model, 0 for the programs, 2 for the rest; x86-cpu has 3$",
    ):
        make("small", target=small)


def test_a_context_longer_than_the_models_is_refused(make: Make) -> None:
    with pytest.raises(ModelError, match="made for 1024 tokens, 4096 are asked for"):
        make(settings=build.BundleSettings(name="tiny", version="1.0", context=4096))


def test_golden_prompts_are_required_and_must_fit(make: Make) -> None:
    with pytest.raises(DataError, match="no golden prompts"):
        make("a", golden=[])
    with pytest.raises(DataError, match="golden prompt 0 has 600 tokens"):
        make("b", golden=[{"messages": [], "prompt_ids": [1] * 600}])


def test_programs_for_another_processor_are_refused(make: Make) -> None:
    other = target().model_copy(update={"arch": "aarch64"})
    with pytest.raises(HostError, match="llama-bench is for x86_64, the target x86-cpu is aarch64"):
        make(target=other)


def test_programs_that_need_a_newer_glibc_are_refused_with_the_symbol(make: Make) -> None:
    with pytest.raises(HostError, match=r"needs glibc 2\.\d+ \(symbol \w+\), the target x86-cpu has 2\.3$"):
        make(target=target(glibc_floor="2.3"))


def test_a_library_that_is_neither_in_the_build_nor_in_glibc_is_refused(make: Make, llama: LlamaCpp) -> None:
    listing = shutil.which("ls")  # needs libselinux or libcap on most systems
    assert listing is not None
    shutil.copyfile(Path(listing).resolve(), llama.bin / "llama-server")
    from toolchain.bundle.runtime import read_elf

    if set(read_elf(llama.bin / "llama-server").needed) <= {"libc.so.6"}:
        pytest.skip("ls needs nothing but glibc here")
    with pytest.raises(HostError, match=r"lib\w+\.so\.\d+ is not in .*, and the programs need it"):
        make()


def test_the_model_card_shows_the_ledger_as_a_table(make: Make) -> None:
    card = (make() / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| student after  | 2.0 M + 0.0 M | 8.0 | 4.500      | 0.2500        | 50.0 % |" in card
    assert "1.0000 before, 0.2500 after" in card
    assert "passed: KL(adapter ‖ merged)" in card
    assert "```json" not in card
    assert "`./edgectl bench` measures them" in card


def test_what_only_the_device_can_tell_is_marked_with_the_command_that_tells(make: Make) -> None:
    marked = files.open_bundle(make()).manifest["on_device"]
    assert marked["tokens_per_second"] == {"measured": False, "command": "./edgectl bench"}
    assert all(entry["measured"] is False for entry in marked.values())


def test_a_name_that_nobody_vouches_for_forges_no_line(make: Make) -> None:
    folder = make()
    (folder / "x\nok    everything").write_text("")
    (folder / os.fsdecode(b"\xff")).write_text("")
    (folder / "web" / "more").mkdir()
    assert files.problems(files.open_bundle(folder)) == [
        "'x\\nok    everything': extra: not in the manifest",
        "'\\udcff': extra: not in the manifest",
        "web/more: extra: a folder that the manifest does not need",
    ]


def test_a_context_that_does_not_fit_into_memory_is_found_and_a_changed_file_first(make: Make) -> None:
    folder = make()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["cache_bytes"] = 1 << 42
    bundles.reseal(folder, manifest)
    record = verify.run(folder, lambda line: None, required=None)
    failed = {item["name"]: item["detail"] for item in record["checks"] if not item["ok"]}
    assert set(failed) == {"memory"}
    assert "are needed for the model, its context and the server" in failed["memory"]
    (folder / "presets.json").write_text("{}")
    record = verify.run(folder, lambda line: None, required=None)
    assert [item["name"] for item in record["checks"]] == ["signature", "files"]


def test_a_path_that_cannot_be_named_is_an_error_of_one_line(make: Make) -> None:
    for verb in (["verify", "x" * 300], ["pack", "x" * 300, "--form", "archive", "--out", "y"]):
        done = bundles.toolchain(*verb)
        assert done.returncode == 1
        assert done.stderr == f"error: {'x' * 300}: File name too long\n"


def test_the_parts_list_is_valid_cyclonedx_and_has_every_program_with_its_digest(make: Make) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    folder = make()
    text = (folder / "sbom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    parts = {part["name"]: part for part in json.loads(text)["components"]}
    assert {"llama.cpp", "ggml", "cpp-httplib", "nlohmann-json", "libstdc++ and libgcc", "edgectl", "tiny"} <= set(
        parts
    )
    manifest = files.open_bundle(folder).manifest
    listed = {part["name"]: part["hashes"][0]["content"] for part in parts["llama.cpp"]["components"]}
    patches = [patch["diff"]["text"]["content"] for patch in parts["llama.cpp"]["pedigree"]["patches"]]
    assert patches == [path.read_text(encoding="utf-8") for path in llama_cpp.patches()]
    programs = [path for path in manifest["files"] if path.startswith("runtime/bin/")]
    assert {path: manifest["files"][path]["sha256"] for path in programs} == listed
    assert parts["tiny"]["hashes"][0]["content"] == manifest["model"]["sha256"]
    assert {"name": "toolchain:lineage:quantize", "value": "sha256:" + "0" * 64} in parts["tiny"]["properties"]
    assert parts["libstdc++ and libgcc"]["version"] == manifest["runtime"]["compiler"]


def test_every_part_whose_licence_asks_for_its_text_has_it(make: Make) -> None:
    texts = {path.name for path in (make() / "LICENSES").iterdir()}
    assert {"llama.cpp.txt", "toolchain.txt", "gcc-runtime.txt"} <= texts
    of_parts = {f"llama.cpp-{part['name']}.txt" for part in versions()["llama_cpp"]["vendored"]}
    # These two come with their own text in the build (as LICENSE-jsonhpp), or ask for none.
    silent = {f"llama.cpp-{name}.txt" for name in ("nlohmann-json", "subprocess.h", "sha1", "sha256")}
    assert of_parts - texts == silent


def test_what_is_compiled_in_is_what_the_pinned_source_has() -> None:
    """Versions and licence texts are read from the source again, where it was fetched to be built."""
    if not llama_cpp.archive_path().is_file():
        pytest.skip("the pinned source is not in the cache: toolchain llama-cpp build")
    marks = {
        "cpp-httplib": ("cpp-httplib/httplib.h", '#define CPPHTTPLIB_VERSION "{}"'),
        "nlohmann-json": ("nlohmann/json.hpp", "version {}"),
        "stb_image": ("stb/stb_image.h", "stb_image - v{} "),
        "miniaudio": ("miniaudio/miniaudio.h", "miniaudio - v{} "),
        "xxhash": ("hash/xxhash/xxhash.h", "XXH_VERSION_MAJOR {} XXH_VERSION_MINOR {} XXH_VERSION_RELEASE {}"),
    }
    texts = {
        "cpp-httplib": "cpp-httplib/LICENSE",
        "xxhash": "hash/xxhash/LICENSE",
        "rotate-bits": "hash/rotate-bits/LICENSE.md",
    }
    found: dict[str, str] = {}
    with tarfile.open(llama_cpp.archive_path()) as archive:
        for member in archive:
            _, mark, path = member.name.partition("/vendor/llama.cpp/vendor/")
            if mark and (path in texts.values() or path in {file for file, _ in marks.values()}):
                content = archive.extractfile(member)
                assert content is not None
                found[path] = content.read().decode(errors="replace")
    versioned = {part["name"]: part["version"] for part in versions()["llama_cpp"]["vendored"] if "version" in part}
    assert set(versioned) == set(marks)
    for name, (path, pattern) in marks.items():
        parts = versioned[name].split(".") if pattern.count("{}") > 1 else [versioned[name]]
        words = " ".join(found[path].replace("#define XXH", "XXH").split())
        assert pattern.format(*parts).strip() in words, name
    for name, path in texts.items():
        assert (resource("licences") / f"{name}.txt").read_text(encoding="utf-8") == found[path]


def test_the_manifest_has_the_form_that_is_documented(make: Make) -> None:
    import jsonschema

    documented = json.loads((resource("docs") / "manifest.schema.json").read_text(encoding="utf-8"))
    assert documented == BundleManifest.model_json_schema()
    content = json.loads((make() / "manifest.json").read_text(encoding="utf-8"))
    jsonschema.validate(content, documented)
    del content["model"]["sha256"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, documented)


def _bytes_read() -> int:
    """What this process has read from files so far, whether from disk or from memory."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


@pytest.mark.parametrize("linked", [True, False])
def test_each_byte_of_the_model_is_read_once(make: Make, model: Path, tmp_path: Path, linked: bool) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(model.read_bytes() + bytes(4 << 20))  # far more than all the rest, which is read a few times
    gguf.chmod(0o644 if linked else 0o600)
    make("warm", gguf=gguf)  # what is imported on the way has been read then
    before = _bytes_read()
    folder = make("counted", gguf=gguf)
    read = _bytes_read() - before
    others = sum(len(content) for _, content in every_byte(folder).values()) - gguf.stat().st_size
    assert gguf.stat().st_size < read < gguf.stat().st_size + 4 * others < 2 * gguf.stat().st_size
    assert ((folder / "model" / "tiny-v1.0-F32.gguf").stat().st_ino == gguf.stat().st_ino) == linked


def test_a_model_that_is_not_the_one_that_was_made_is_refused(make: Make) -> None:
    with pytest.raises(ArtifactError, match="bytes have changed since it was made"):
        make(gguf_sha256="0" * 64)


BUILD = """
import sys
from pathlib import Path
from tests.device import bundles
make = bundles.maker(bundles.install(Path(sys.argv[1], "llama.cpp")), Path(sys.argv[2]), Path(sys.argv[1]))
print(make())
"""


@pytest.mark.parametrize("umask", ["077", "000"])
def test_another_umask_locale_time_zone_and_day_give_the_same_bytes_and_modes(
    make: Make, model: Path, tmp_path: Path, umask: str
) -> None:
    here = make()
    there = tmp_path / "there"
    there.mkdir()
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "TZ": "Pacific/Kiritimati",
        "PYTHONHASHSEED": "7",
        "HOME": "/nonexistent",
    }
    argv = ["sh", "-c", f'umask {umask}; exec "$@"', "sh", sys.executable, "-c", BUILD, str(there), str(model)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    other = Path(done.stdout.strip())
    assert every_byte(here) == every_byte(other)
    folders = [path for path in [other, *other.rglob("*")] if path.is_dir()]
    assert len(folders) > 5
    assert {path.stat().st_mode & 0o7777 for path in folders} == {0o755}
