"""Parse, call, print: the command line. Heavy imports stay inside the commands, so that --help answers at once."""

import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from toolchain import __version__
from toolchain.errors import ArtifactError, HostError, RecipeError, ToolchainError

if TYPE_CHECKING:
    from toolchain.gguf.llama_cpp import LlamaCpp
    from toolchain.runner import Pipeline
    from toolchain.target import TargetProfile

# The pipeline's stages, told here again so that --help need not import it; a test compares the two.
VERBS = {
    "teacher": "Check the teacher, or unpack its GGUF into a checkpoint.",
    "student": "Make the student's base: the teacher, or another model, with the layers that stay.",
    "vocabulary": "Say whether teacher and student share their tokens, and refuse a loss that needs it if not.",
    "generate": "Teacher answers to the questions.",
    "select": "Choose among the answers, and make them rows of the student's tokens.",
    "capture": "The teacher's top-k logits over its answers.",
    "distill": "Train the student's LoRA adapter on answers and logits.",
    "on_policy": "Train further on the student's own answers, which the teacher scores.",
    "merge": "Fold the adapter into the base, and check that nothing was lost.",
    "compare": "Teacher, student before and student after answer questions, and are scored.",
    "convert": "Merged checkpoint → 16-bit GGUF, by llama.cpp's converter.",
    "imatrix": "The importance matrix, from the training rows.",
    "quantize": "16-bit GGUF → quantized GGUF, Q4_K_M by default.",
    "evaluate": "The ledger: what was gained and lost from teacher to GGUF.",
    "bundle": "Package model and runtime for a target.",
    "smoke": "Try the bundle as the device will run it.",
    "bench": "Measure the bundle as it is served: tokens/s, cold start, memory.",
    "forms": "The bundle as one file each: an archive, an image.",
}


class _Ordered(click.Group):
    """Lists commands in the order of the way, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _StageGroup(_Ordered):
    """A stage's verb that has commands of its own, as `bench compare A B`; any other first word is the recipe."""

    allow_extra_args = False
    allow_interspersed_args = True

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self.commands:
            return self.commands[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.group(cls=_Ordered, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="toolchain")
def cli() -> None:
    """Distil a large language model into a small one and take it to a device, measured at every step."""


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
work_option = click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=Path("work"), show_default=True,
    help="Folder for everything that is made.",
)  # fmt: skip
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a key of the recipe, such as distill.epochs=2. VALUE is TOML; repeatable.",
)  # fmt: skip
target_option = click.option(
    "--target", "targets", multiple=True, help="Only this target of targets/; repeatable. Default: those of the recipe."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
verify_option = click.option("--verify", is_flag=True, help="Hash the bytes of every artifact that is reused.")
launcher_option = click.option(
    "--launcher", default="", metavar="COMMAND",
    help="On several GPUs or hosts: what starts capture and distill ('torchrun --standalone --nproc-per-node 2').",
)  # fmt: skip
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Only errors.")


def _overrides(given: tuple[str, ...]) -> dict[str, Any]:
    import tomllib

    result: dict[str, Any] = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise RecipeError(f"--set {text}: not of the form KEY=VALUE", hint="for example --set distill.epochs=2")
        try:
            result[key.strip()] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            result[key.strip()] = value.strip()  # a bare word is a string
    return result


def _pipeline(recipe: Path, work: Path, overrides: tuple[str, ...], targets: tuple[str, ...] = ()) -> "Pipeline":
    from toolchain.recipe import read_recipe
    from toolchain.runner import Pipeline

    return Pipeline(read_recipe(recipe, _overrides(overrides)), work, targets=targets or None)


@cli.command()
@recipe_argument
@work_option
@set_option
@target_option
@click.option("--until", type=click.Choice(list(VERBS)), help="Stop after this stage.")
@launcher_option
@verify_option
@quiet_option
def run(
    recipe: Path, work: Path, overrides: tuple[str, ...], targets: tuple[str, ...], until: str | None, launcher: str,
    verify: bool, quiet: bool,
) -> None:  # fmt: skip
    """Run every stage of a recipe that is not done yet, and report."""
    from toolchain import report
    from toolchain.terminal import Terminal

    pipeline = _pipeline(recipe, work, overrides, targets)
    with Terminal(quiet=quiet) as terminal:
        pipeline.run(
            report=terminal, on_step=terminal.on_step, until=until, verify=verify, command=f"run {recipe}",
            launcher=shlex.split(launcher),
        )  # fmt: skip
    if until is None:
        text, markdown, _ = report.write(pipeline)
        click.echo(text)
        if not quiet:
            click.echo(f"report: {markdown}", err=True)


@cli.command()
@recipe_argument
@work_option
@set_option
@target_option
@json_option
def plan(recipe: Path, work: Path, overrides: tuple[str, ...], targets: tuple[str, ...], as_json: bool) -> None:
    """Show what would run, what is reused, and why."""
    planned = _pipeline(recipe, work, overrides, targets).plan()
    if as_json:
        rows = [
            {
                "step": item.step.name,
                "state": item.state,
                "why": item.why,
                "fingerprint": item.order.fingerprint if item.order else None,
                "path": str(item.final) if item.final else None,
            }
            for item in planned
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(item.step.name) for item in planned)
    for item in planned:
        where = f"  {item.final}" if item.state == "reuse" else ""
        click.echo(f"{item.step.name:<{width}}  {item.state:<6}  {item.why}{where}")


def _stage_verb(name: str, summary: str) -> Callable[..., None]:
    def verb(
        recipe: Path, work: Path, overrides: tuple[str, ...], verify: bool, quiet: bool, targets: tuple[str, ...] = (),
        launcher: str = "",
    ) -> None:  # fmt: skip
        from toolchain.terminal import Terminal

        pipeline = _pipeline(recipe, work, overrides, targets)
        with Terminal(quiet=quiet) as terminal:
            pipeline.run(
                report=terminal, on_step=terminal.on_step, only=name, verify=verify, command=f"{name} {recipe}",
                launcher=shlex.split(launcher),
            )  # fmt: skip
        for step_name, artifact in pipeline.artifacts().items():
            if step_name.split("[")[0] == name:
                click.echo(artifact.path)

    verb.__doc__ = f"{summary} Needs the stages before it. Prints the folder that holds the result."
    options = [recipe_argument, work_option, set_option, verify_option, quiet_option]
    if name in ("bundle", "smoke", "bench", "forms"):
        options.append(target_option)
    if name in ("capture", "distill"):
        options.append(launcher_option)
    command: Callable[..., None] = verb
    for option in reversed(options):
        command = option(command)
    return command


for _name, _summary in VERBS.items():
    if _name != "bench":
        cli.command(_name, short_help=_summary)(_stage_verb(_name, _summary))
    else:
        bench_group = cli.group(
            _name, short_help=_summary, cls=_StageGroup, invoke_without_command=True, subcommand_metavar=""
        )(_stage_verb(_name, _summary))


@bench_group.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@json_option
def compare_records(a: Path, b: Path, as_json: bool) -> None:
    """Compare two benchmark records, A before and B after: is B faster, by how much, and how sure is that?

    A record is results.json of the stage, or what `edgectl bench --json` prints on a device.
    """
    from toolchain.evaluate import bench_compare, bench_compare_text

    result = bench_compare.compare(a, b)
    click.echo(json.dumps(result, indent=2) if as_json else bench_compare_text.render(result))


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))


@cli.command()
@bundle_argument
@click.option(
    "--key", type=click.Path(path_type=Path), envvar="TOOLCHAIN_SIGNING_KEY", show_envvar=True, required=True,
    help="An OpenSSH key, such as ~/.ssh/id_ed25519; or the .pub file of one that ssh-agent holds.",
)  # fmt: skip
def sign(bundle: Path, key: Path) -> None:
    """Sign a bundle's folder with a key you have: ssh-keygen writes SHA256SUMS.sig. Sign first, pack then."""
    from toolchain.bundle import seal

    click.echo(seal.sign(bundle, key=key))


@cli.command()
@bundle_argument
@click.option(
    "--form", type=click.Choice(["archive", "image"]), required=True, help="A .tar to unpack, or an OCI image."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option(
    "--base", type=click.Path(path_type=Path),
    help="For an image: what it stands on, with glibc and Python; an OCI layout, or what `docker save` wrote.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@quiet_option
def pack(bundle: Path, form: str, out: Path, base: Path | None, force: bool, quiet: bool) -> None:
    """Make one file of a bundle's folder: the same bytes wherever and whenever it is done. Prints its digest."""
    from toolchain.bundle import archive, image
    from toolchain.terminal import Terminal

    if form == "image" and base is None:
        raise RecipeError("--form image: --base is missing", hint="docker save -o base.tar debian:bookworm-slim, say")
    if form == "archive" and base is not None:
        raise RecipeError("--base is for images", hint="leave it out, or give --form image")
    with Terminal(quiet=quiet) as terminal:
        if base is None:
            digest = archive.pack(bundle, out, report=terminal, force=force)["sha256"]
        else:
            digest = image.pack(bundle, out, base=base, report=terminal, force=force)["digest"]
    click.echo(f"sha256:{digest}")


@cli.command()
@click.option("--arch", type=click.Choice(["x86_64", "aarch64"]), help="The device's processor.")
@click.option(
    "--target", "target", metavar="T", help="The device, in place of its processor: for CUDA's libraries too."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@quiet_option
def base(arch: str | None, target: str | None, out: Path, force: bool, quiet: bool) -> None:
    """Make a base for `pack --form image` of Debian's packages: glibc and Python, 60 MB, no registry, no engine.

    For a Jetson with JetPack 7 (--target jetson-orin-jp7) NVIDIA's libraries are in it as well, 690 MB.
    """
    from toolchain.bundle import minimal_base
    from toolchain.target import read_target
    from toolchain.terminal import Terminal

    if (arch is None) == (target is None):
        raise click.UsageError("give --arch or --target, one of them")
    profile = read_target(target) if target is not None else None
    with Terminal(quiet=quiet) as terminal:
        made = minimal_base.make(
            out,
            arch=profile.arch if profile else str(arch),
            target=profile,
            report=terminal,
            force=force,
        )
        digest = made["digest"]
    click.echo(f"sha256:{digest}")


@cli.command()
@bundle_argument
@click.option("--image", "reference", metavar="REF", required=True, help="The bundle's image, as Podman knows it.")
def quadlet(bundle: Path, reference: str) -> None:
    """Print a NAME.container file, by which Podman and systemd run a bundle's image as a service."""
    from toolchain.bundle import quadlet as unit

    click.echo(unit.text(bundle, reference=reference), nl=False)


@cli.command()
@bundle_argument
@click.option(
    "--allowed-signers", type=click.Path(path_type=Path), metavar="F",
    help="Require a signature of one whom this file names, as in ssh-keygen(1).",
)  # fmt: skip
@click.option("--signer", metavar="ID", help="Require the signature of this one of them.")
@json_option
def verify(bundle: Path, allowed_signers: Path | None, signer: str | None, as_json: bool) -> None:
    """Check signature and every file of a bundle's folder or archive, as ./edgectl does on the device."""
    from toolchain.bundle import seal
    from toolchain.terminal import Terminal

    with Terminal(quiet=as_json) as terminal:
        record = seal.check(bundle, allowed_signers=allowed_signers, signer=signer, report=terminal)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        for item in record["checks"]:
            click.echo(f"{'ok  ' if item['ok'] else 'FAIL'}  {item['name']:<9}  {item['detail']}")
    if not record["ok"]:
        sys.exit(1)


@cli.command()
@click.argument("devices", metavar="USER@HOST[,USER@HOST…]")
@bundle_argument
@click.option("--home", metavar="DIR", help="Folder of the releases there. Default: edgectl's own.")
@click.option("--service", type=click.Choice(["systemd", "process"]), help="What keeps the server running there.")
@click.option("--host", metavar="ADDRESS", help="Address to listen on there. Default: as before.")
@click.option("--port", type=int, help="Port to listen on there. Default: as before.")
@click.option("--api-key-file", metavar="F", help="A file on the device with the keys that are let in.")
@click.option("--allowed-signers", metavar="F", help="A file on the device: require a signature of one it names.")
@click.option("--signer", metavar="ID", help="Require the signature of this one of them.")
@click.option("--sudo", is_flag=True, help="Install as root, by `sudo -n`, which asks for no password.")
@click.option("--bench", is_flag=True, help="Measure each device once it serves; takes minutes.")
@click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Devices at a time.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the records of each device. Default: deploy/ and the bundle's id.",
)  # fmt: skip
@click.option("-o", "--ssh-option", "ssh_options", multiple=True, metavar="KEY=VALUE",
    help="An option of ssh_config(5), such as Port=2222 or IdentityFile=key; repeatable.",
)  # fmt: skip
@click.option("--staging", metavar="DIR", help="Folder there to copy into first. Default: .cache/edgectl/incoming.")
@click.option("--bwlimit", metavar="RATE", help="Send no faster to each device: KiB/s, or as 1.5m; rsync(1).")
@json_option
@quiet_option
def deploy(
    devices: str, bundle: Path, jobs: int, out: Path | None, as_json: bool, quiet: bool, staging: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Put a bundle in service on devices, by ssh and rsync: copy what is not there, install, try, keep or go back.

    Exit 1 when one of them is not well; the others are deployed all the same.
    """
    from toolchain.bundle import deploy as stage
    from toolchain.terminal import Terminal

    asked = stage.Options(staging=staging or stage.STAGING, **options)
    with Terminal(quiet=quiet) as terminal:
        fleet = stage.Fleet(devices, bundle, options=asked, jobs=jobs, out=out, say=terminal.say)
        try:
            fleet.run()
        finally:
            click.echo(json.dumps(fleet.report(), indent=2, ensure_ascii=False) if as_json else fleet.table())
    if not fleet.well:
        sys.exit(1)


@cli.command("report")
@recipe_argument
@work_option
@set_option
@json_option
def report_command(recipe: Path, work: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write report.md and report.json again from what is in the work folder, and print the report."""
    from toolchain import report

    text, _, as_data = report.write(_pipeline(recipe, work, overrides))
    click.echo(as_data.read_text(encoding="utf-8") if as_json else text)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("recipe.toml"))
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(path: Path, force: bool) -> None:
    """Write a commented recipe with every key and its default."""
    from toolchain.template import recipe_template

    if path.exists() and not force:
        raise RecipeError(f"{path} is there already", hint="give another name, or --force to replace it")
    path.write_text(recipe_template(), encoding="utf-8")
    click.echo(f"{path}: set teacher.model, data.train and data.held_out, then: toolchain plan {path}")


@cli.command()
@click.option("--of", "kind", type=click.Choice(["recipe", "target", "manifest"]), default="recipe", show_default=True)
def schema(kind: str) -> None:
    """Print the JSON Schema of a recipe, a target profile or a bundle's manifest."""
    from toolchain.bundle.manifest import BundleManifest
    from toolchain.recipe import Recipe
    from toolchain.settings import Settings
    from toolchain.target import TargetProfile

    models: dict[str, type[Settings]] = {"recipe": Recipe, "target": TargetProfile, "manifest": BundleManifest}
    click.echo(json.dumps(models[kind].model_json_schema(), indent=2))


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@work_option
@json_option
def doctor(recipe: Path | None, work: Path, as_json: bool) -> None:
    """Check this machine, and what a recipe needs of it. Exit 1 when something is missing, with the remedy."""
    from toolchain import doctor as checks
    from toolchain.recipe import read_recipe

    findings = checks.examine(read_recipe(recipe) if recipe else None, work)
    if as_json:
        click.echo(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(finding.as_line())
    if any(finding.state == "missing" for finding in findings):
        sys.exit(1)


@cli.group("llama-cpp", cls=_Ordered)
def llama_cpp_group() -> None:
    """The pinned llama.cpp: fetch and build it, or say where it is."""


@llama_cpp_group.command("build")
@quiet_option
def llama_cpp_build(quiet: bool) -> None:
    """Fetch the pinned source and build it into the cache, once. Needs the network the first time."""
    from toolchain.gguf import llama_cpp
    from toolchain.pipeline import host_cmake
    from toolchain.terminal import Terminal

    with Terminal(quiet=quiet) as terminal:
        built = llama_cpp.build(host_cmake(), report=terminal)
    click.echo(built.root)


@llama_cpp_group.command("where")
def llama_cpp_where() -> None:
    """Print the folder of the build; exit 1 when it is not built."""
    from toolchain.gguf import llama_cpp
    from toolchain.pipeline import host_cmake

    click.echo(llama_cpp.find(host_cmake()).root)


@cli.group("runtime", cls=_Ordered)
def runtime_group() -> None:
    """What serves on a device: llama-server and llama-bench for a target, built and checked, or where they are."""


one_target_option = click.option(
    "--target", required=True, help="A target of targets/, or the path of a profile of your own."
)


@runtime_group.command("build")
@one_target_option
@click.option("--twice", is_flag=True, help="Build it again elsewhere, and hold every byte against what is there.")
@quiet_option
def runtime_build(target: str, twice: bool, quiet: bool) -> None:
    """Build the pinned llama.cpp for a target into the cache, once, and check it. Prints the folder.

    Checked: processor and instructions, glibc, alignment to pages, libraries that the device would lack.
    """
    from toolchain.gguf import llama_cpp, rebuild
    from toolchain.target import read_target
    from toolchain.terminal import Terminal

    profile = read_target(target)
    profile.check_build_host(platform.machine())
    with Terminal(quiet=quiet) as terminal:
        built = llama_cpp.build(profile.runtime.cmake, report=terminal)
        terminal.line(_checked(built, profile))
        if twice:
            found = rebuild.differing(built, target, report=terminal)
            if found:
                raise ArtifactError(f"{len(found)} files differ when it is built again: {', '.join(found)}")
            terminal.say("built again elsewhere: the same bytes in every file")
    click.echo(built.root)


@runtime_group.command("where")
@one_target_option
def runtime_where(target: str) -> None:
    """Check what was built for a target again, and print its folder; exit 1 when it is not built."""
    from toolchain.gguf import llama_cpp
    from toolchain.target import read_target

    profile = read_target(target)
    built = llama_cpp.find(profile.runtime.cmake)
    click.echo(_checked(built, profile), err=True)
    click.echo(built.root)


def _checked(built: "LlamaCpp", profile: "TargetProfile") -> str:
    import tempfile

    from toolchain.bundle import runtime

    try:
        temporary = tempfile.TemporaryDirectory()
    except OSError as error:
        hint = "free some space, or set TMPDIR to a folder on another disk"
        raise HostError(f"no temporary folder can be made: {error.strerror}", hint=hint) from None
    with temporary as folder:
        facts = runtime.collect(built, profile, Path(folder, "bin"))
    return (
        f"{profile.name}: {len(facts.files)} files, {facts.bytes / 1e6:.1f} MB, glibc {facts.glibc_needed}, "
        f"pages of up to {facts.segment_alignment} bytes"
    )


class _Terminated(BaseException):
    """SIGTERM, turned into an exception so that children are ended and locks released."""


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Entry point: one message and a hint for a user's failure; bugs keep their traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Abort:
        _interrupted()
    except KeyboardInterrupt:
        _interrupted()
    except _Terminated:
        click.echo("terminated: what is done is kept, run again to go on", err=True)
        sys.exit(143)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ToolchainError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # A path that cannot be read, written or even named: what is wrong is with it, whichever line met it first.
        if error.filename is None:
            raise
        click.echo(f"error: {os.fsdecode(error.filename)}: {error.strerror}", err=True)
        sys.exit(1)


def _interrupted() -> NoReturn:
    click.echo("interrupted: what is done is kept, run again to go on", err=True)
    sys.exit(130)


if __name__ == "__main__":
    main()
