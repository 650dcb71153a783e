"""`./edgectl VERB`: parse, call, print. This and main.py are the only modules here that write to the terminal."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, launch
from .errors import DeviceError, RolledBackError, UsageError
from .main import say as _say
from .main import tell as _tell

if TYPE_CHECKING:
    from .service import Service


def run(root: str, arguments: list[str]) -> int:
    """Run one verb on the bundle at `root`; the exit code. Raises DeviceError."""
    options = _parser(arguments[0] if arguments else None).parse_args(arguments)
    folder = Path(root)
    return int(options.call(folder if options.takes_folder else files.open_bundle(folder), options))


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """Every verb by name, and the options of the one that is asked for.

    What a verb needs is loaded with it alone: a server's start would otherwise wait for the benchmark's imports.
    """
    parser = argparse.ArgumentParser(prog="edgectl", description="Serve, check and measure the model in this folder.")
    parser.set_defaults(takes_folder=False)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, (summary, add) in _VERBS.items():
        if asked not in _VERBS or name == asked:
            verb = verbs.add_parser(name, help=summary)
            if name == asked:
                add(verb)
    return parser


def _add_serve(verb: argparse.ArgumentParser) -> None:
    known = launch.Options
    verb.add_argument("--host", default=known.host, help="address to listen on (default: %(default)s)")
    verb.add_argument("--port", type=int, default=known.port, help="port to listen on (default: %(default)s)")
    verb.add_argument("--api-key-file", type=Path, metavar="F", help="file with the keys that are let in, one a line")
    _tuned_home_option(verb)
    verb.add_argument("--no-tuned", action="store_true", help="the presets' settings, whatever tune has found")
    verb.add_argument("--json", action="store_true", help="print a line of JSON when it is ready and when it has ended")
    verb.set_defaults(call=_serve)


def _add_smoke(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(call=_smoke)
    _json_option(verb)


def _add_bench(verb: argparse.ArgumentParser) -> None:
    from . import bench

    known = bench.Options()
    verb.description = (
        "What is left out is the bundle's, by its target; the defaults shown are of one that says nothing."
    )
    verb.add_argument("--out", type=Path, metavar="F", help="write the record, as JSON, to this file")
    for name in ("repetitions", "cold_starts", "prompt_tokens", "generated_tokens"):
        text = f"(default: {getattr(known, name)})"
        verb.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=text)
    text = f"tokens before the long-context decode, as many as fit; 0 leaves it out (default: {known.depth})"
    verb.add_argument("--depth", type=int, metavar="N", help=text)
    text = f"how many ask at the same time (default: {','.join(map(str, known.clients))})"
    verb.add_argument("--clients", type=list_of_numbers, metavar="N,…", help=text)
    text = (
        "answer without a pause, ten minutes or as many as given: does the device slow down? (default: 0, not at all)"
    )
    verb.add_argument("--sustained", type=float, nargs="?", const=10.0, metavar="MINUTES", help=text)
    text = f"pause before that (default: {known.cool_down_s:g})"
    verb.add_argument("--cool-down", type=float, metavar="SECONDS", help=text)
    verb.set_defaults(call=_bench)
    _json_option(verb)


def _add_gate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("record", type=Path, metavar="RECORD", help="what bench --out wrote")
    verb.set_defaults(call=_gate)
    _json_option(verb)


def _add_tune(verb: argparse.ArgumentParser) -> None:
    from . import tune

    known_best = tune.Options()
    text = "the search ends before that (default: %(default)g)"
    verb.add_argument("--minutes", type=float, metavar="N", default=known_best.minutes, help=text)
    text = "memory that the server may take (default: 1.1 times what it takes with the presets)"
    verb.add_argument("--max-memory-mib", type=int, metavar="N", default=known_best.max_memory_mib, help=text)
    verb.add_argument("--again", action="store_true", help="measure anew what was tuned already")
    text = "keep what is found while other programs use the processors: they always do here"
    verb.add_argument("--under-load", action="store_true", help=text)
    _tuned_home_option(verb)
    verb.set_defaults(call=_tune)
    _json_option(verb)


def _add_verify(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(call=_verify, takes_folder=True)
    _signer_options(verb)
    _json_option(verb)


def _add_doctor(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(call=_doctor)
    _json_option(verb)


def _add_unpack(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("archive", type=Path, metavar="ARCHIVE", help="a .tar that `toolchain pack` made")
    verb.add_argument("into", type=Path, metavar="FOLDER", help="where the bundle's folder is to be made")
    verb.set_defaults(call=_unpack, takes_folder=True)
    _signer_options(verb)
    _json_option(verb)


def _add_install(verb: argparse.ArgumentParser) -> None:
    from . import releases

    verb.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="BUNDLE",
        help="another bundle's folder or archive (default: the bundle of this edgectl)",
    )
    _home_options(verb)
    known = releases.Settings()
    verb.add_argument("--host", help=f"address to listen on (default: as before, or {known.host})")
    verb.add_argument("--port", type=int, help=f"port to listen on (default: as before, or {known.port})")
    verb.add_argument("--api-key-file", type=Path, metavar="F", help="file with the keys that are let in, one a line")
    verb.set_defaults(call=_install, takes_folder=True)
    _signer_options(verb)
    _json_option(verb)


def _add_on_releases(call: Callable[[Path, argparse.Namespace], int]) -> Callable[[argparse.ArgumentParser], None]:
    """The options of a verb that works on the releases of a home and tells what it did."""

    def add(verb: argparse.ArgumentParser) -> None:
        _home_options(verb)
        verb.set_defaults(call=call, takes_folder=True)
        _json_option(verb)

    return add


def _add_supervise(verb: argparse.ArgumentParser) -> None:
    _home_options(verb, service=False)
    verb.set_defaults(call=_supervise, takes_folder=True)


def _add_info(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(call=_info)
    _json_option(verb)


def _json_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print the record as JSON")


def _home_options(verb: argparse.ArgumentParser, *, service: bool = True) -> None:
    from . import releases
    from . import service as service_module

    text = "folder of the releases (default: %(default)s)"
    verb.add_argument("--home", type=Path, default=releases.default_home(), metavar="DIR", help=text)
    if service:
        text = "what keeps the server running (default: systemd for root where it is the init, else a process)"
        verb.add_argument("--service", choices=service_module.KINDS, help=text)


def _tuned_home_option(verb: argparse.ArgumentParser) -> None:
    home = os.environ.get(launch.HOME_VARIABLE) or launch.default_home()
    text = "folder where tune keeps what it has found (default: %(default)s)"
    verb.add_argument("--home", type=Path, default=Path(home), metavar="DIR", help=text)


def _signer_options(verb: argparse.ArgumentParser) -> None:
    from . import signature

    where = signature.MACHINE_POLICY
    text = (
        f"require a signature of one whom this file names, as in ssh-keygen(1) (default: {where}, where there is one)"
    )
    verb.add_argument("--allowed-signers", type=Path, metavar="F", help=text)
    verb.add_argument("--signer", metavar="ID", help="require the signature of this one of them")


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, indent=2, ensure_ascii=False))


def _serve(bundle: files.Bundle, options: argparse.Namespace) -> int:
    from . import serve, tuned

    found = None if options.no_tuned else tuned.find(options.home, bundle, _say)
    serve.run(
        bundle,
        host=options.host,
        port=options.port,
        key_file=options.api_key_file,
        tuned=found,
        say=_say,
        tell=_tell if options.json else serve.nobody,
    )
    return 0


def _smoke(bundle: files.Bundle, options: argparse.Namespace) -> int:
    from . import smoke

    return _show_checks(smoke.run(bundle, _say), options.json)


def _verify(root: Path, options: argparse.Namespace) -> int:
    from . import signature, verify

    required = signature.policy(options.allowed_signers, options.signer)
    return _show_checks(verify.run(root, _say, required=required), options.json)


def _unpack(root: Path, options: argparse.Namespace) -> int:
    from . import signature, unpack

    required = signature.policy(options.allowed_signers, options.signer)
    folder = unpack.run(options.archive, options.into, required=required, say=_say)
    if options.json:
        _print_json({"schema_version": 1, "bundle": files.open_bundle(folder).id, "folder": str(folder)})
    else:
        print(folder)
    return 0


def _service(options: argparse.Namespace) -> "Service":
    from . import releases
    from . import service as service_module

    return service_module.find(releases.Home(options.home.absolute()), options.service)


def _install(root: Path, options: argparse.Namespace) -> int:
    from . import install, signature

    changes = {name: value for name in ("host", "port") if (value := getattr(options, name)) is not None}
    if options.api_key_file is not None:
        changes["api_key_file"] = str(options.api_key_file.absolute())
    source = options.source if options.source is not None else root
    service, home = _service(options), options.home.absolute()
    if any(home.resolve().is_relative_to(bundle.resolve()) for bundle in (root, source)):
        raise UsageError(f"--home {home}: is inside the bundle, whose files are sealed", hint="choose another folder")
    required = signature.policy(options.allowed_signers, options.signer)
    return _show_release(
        lambda: install.install(source, service, required=required, changes=changes, say=_say), options.json
    )


def _rollback(root: Path, options: argparse.Namespace) -> int:
    from . import install

    return _show_release(lambda: install.rollback(_service(options), say=_say), options.json)


def _show_release(activate: Callable[[], dict[str, Any]], as_json: bool) -> int:
    """Of a release that was not good there is a record too."""
    try:
        record = activate()
    except RolledBackError as error:
        if as_json:
            _print_json(error.record)
        raise
    if as_json:
        _print_json(record)
    else:
        checks = record["smoke"]["checks"]
        print(f"{record['release']} is served and good: {len(checks)} checks ok; before it: {record['previous']}")
    return 0


def _status(root: Path, options: argparse.Namespace) -> int:
    from . import install

    record = install.status(_service(options))
    if options.json:
        _print_json(record)
    else:
        width = max(len(key) for key in record)
        for key, value in record.items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            if isinstance(value, dict):
                shown = "; ".join(f"{name} {item}" for name, item in value.items() if item is not None)
            print(f"{key.replace('_', ' '):<{width}}  {'none' if shown in (None, '') else shown}")
    return 0 if record["answers"] else 1


def _gc(root: Path, options: argparse.Namespace) -> int:
    from . import install, releases

    removed = install.gc(releases.Home(options.home.absolute()), say=_say)
    return _show_removed(removed, options.json)


def _uninstall(root: Path, options: argparse.Namespace) -> int:
    from . import install

    return _show_removed(install.uninstall(_service(options), say=_say), options.json)


def _show_removed(removed: list[str], as_json: bool) -> int:
    if as_json:
        _print_json({"schema_version": 1, "removed": removed})
    else:
        print("\n".join(removed) if removed else "nothing to remove")
    return 0


def _supervise(root: Path, options: argparse.Namespace) -> int:
    from . import releases, supervise

    supervise.run(releases.Home(options.home.absolute()), _say)
    return 0


def _show_checks(report: dict[str, Any], as_json: bool) -> int:
    if as_json:
        _print_json(report)
    else:
        width = max(len(item["name"]) for item in report["checks"])
        for item in report["checks"]:
            print(f"{'ok  ' if item['ok'] else 'FAIL'}  {item['name']:<{width}}  {item['detail']}")
        failed = sum(not item["ok"] for item in report["checks"])
        print(f"{failed} of {len(report['checks'])} checks failed" if failed else f"{len(report['checks'])} checks ok")
    return 0 if report["ok"] else 1


def _doctor(bundle: files.Bundle, options: argparse.Namespace) -> int:
    from . import doctor

    findings = doctor.examine(bundle)
    if options.json:
        _print_json(doctor.report(bundle.id, findings))
    else:
        print(doctor.table(findings))
    return 1 if doctor.unfit(findings) else 0


def _bench(bundle: files.Bundle, options: argparse.Namespace) -> int:
    from . import bench

    given = {
        "repetitions": options.repetitions,
        "cold_starts": options.cold_starts,
        "prompt_tokens": options.prompt_tokens,
        "generated_tokens": options.generated_tokens,
        "depth": options.depth,
        "clients": options.clients,
        "sustained_minutes": options.sustained,
        "cool_down_s": options.cool_down,
    }
    asked = replace(bench.regime(bundle), **{name: value for name, value in given.items() if value is not None})
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise UsageError(f"--out {options.out}: no such folder")
    if options.out is not None and options.out.resolve().is_relative_to(bundle.root):
        raise UsageError(f"--out {options.out}: is inside the bundle, whose files are sealed", hint="write elsewhere")
    if options.out is not None:
        _check_writable(options.out)
    record = bench.run(bundle, asked, _say)
    if options.out is not None:
        try:
            options.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise DeviceError(f"--out {options.out}: cannot be written: {error.strerror}") from None
    if options.json:
        _print_json(record)
    else:
        print(bench.table(record))
    return 0


def _check_writable(path: Path) -> None:
    """Before minutes are measured for it. Raises UsageError."""
    was_there = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be written: {error.strerror}") from None
    if not was_there:
        path.unlink()


def list_of_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_GATE_CODES = {"passed": 0, "failed": 5, "inconclusive": 6}


def _gate(bundle: files.Bundle, options: argparse.Namespace) -> int:
    from . import gate

    report = gate.judge(bundle, gate.read_record(options.record))
    if options.json:
        _print_json(report)
    else:
        print(gate.table(report))
    return _GATE_CODES[report["verdict"]]


def _tune(bundle: files.Bundle, options: argparse.Namespace) -> int:
    from . import tune

    asked = tune.Options(
        minutes=options.minutes,
        max_memory_mib=options.max_memory_mib,
        again=options.again,
        under_load=options.under_load,
    )
    home = options.home.absolute()
    if home.resolve().is_relative_to(bundle.root):
        raise UsageError(f"--home {home}: is inside the bundle, whose files are sealed", hint="choose another folder")
    record = tune.run(bundle, home, asked, _say)
    if options.json:
        _print_json(record)
    else:
        print(tune.table(record))
    return 0


def _info(bundle: files.Bundle, options: argparse.Namespace) -> int:
    from . import probe, serve

    record = {"bundle": bundle.manifest, "device": probe.probe(), "threads": serve.threads(bundle)}
    if options.json:
        _print_json(record)
        return 0
    model, runtime = bundle.manifest["model"], bundle.manifest["runtime"]
    rows = {
        "bundle": f"{bundle.manifest['name']} {bundle.manifest['version']} for {bundle.manifest['target']['name']}",
        "id": bundle.id,
        "model": f"{model['file']}, {model['bytes'] / 2**20:.1f} MiB, {model['bits_per_weight']:.2f} bits per weight",
        "context": f"{model['context']} tokens",
        "llama.cpp": runtime["llama_cpp_commit"],
        "threads": str(record["threads"]),
        **{key: str(value) for key, value in probe.probe().items()},
    }
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return 0


_VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "serve": ("run the OpenAI-compatible server until Ctrl-C or SIGTERM", _add_serve),
    "smoke": ("check that the bundle works on this machine", _add_smoke),
    "bench": ("measure speed, cold start and memory", _add_bench),
    "tune": ("find settings that serve faster on this very machine, and the same answers", _add_tune),
    "gate": ("hold a benchmark record to the bundle's budgets", _add_gate),
    "verify": ("check signature, every file and what the machine offers", _add_verify),
    "doctor": ("is this machine fit for the bundle right now, and in which state", _add_doctor),
    "unpack": ("unpack another bundle's archive, once it is found whole", _add_unpack),
    "install": ("put a bundle in service: stage, swap, start, try, keep or go back", _add_install),
    "rollback": ("serve the release that was good before this one", _add_on_releases(_rollback)),
    "status": ("say what is installed and what is served", _add_on_releases(_status)),
    "gc": ("remove releases that are neither served nor needed for a rollback", _add_on_releases(_gc)),
    "uninstall": ("stop the service and remove every release", _add_on_releases(_uninstall)),
    "supervise": ("what the service runs: serve the release that is to be served", _add_supervise),
    "info": ("say what the bundle is and what this machine is", _add_info),
}
