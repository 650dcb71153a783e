"""`./edgectl VERB`: parse, call, print. The only module here that writes to the terminal."""

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from . import (
    bench,
    doctor,
    files,
    install,
    probe,
    releases,
    serve,
    signature,
    smoke,
    supervise,
    tune,
    tuned,
    unpack,
    verify,
)
from . import service as service_module
from .errors import DeviceError, UsageError


class _TerminatedError(Exception):
    """SIGTERM, or the terminal is gone."""


def main(root: Path, arguments: list[str]) -> int:
    """Run one verb on the bundle at `root`; the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    options = _parser().parse_args(arguments)
    try:
        return int(options.call(root if options.takes_folder else files.open_bundle(root), options))
    except DeviceError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyError as error:
        print(f"error: the bundle's JSON files lack the key {error}", file=sys.stderr)
        print("hint: ./edgectl verify says which file was changed", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except _TerminatedError:
        return 143
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _TerminatedError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgectl", description="Serve, check and measure the model in this folder.")
    parser.set_defaults(takes_folder=False)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("serve", help="run the OpenAI-compatible server until Ctrl-C or SIGTERM")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    verb.add_argument("--port", type=int, default=8080, help="port to listen on (default: %(default)s)")
    verb.add_argument("--api-key-file", type=Path, metavar="F", help="file with the keys that are let in, one a line")
    _tuned_home_option(verb)
    verb.add_argument("--no-tuned", action="store_true", help="the presets' settings, whatever tune has found")
    verb.set_defaults(call=_serve)

    verb = verbs.add_parser("smoke", help="check that the bundle works on this machine")
    verb.set_defaults(call=_smoke)
    _json_option(verb)

    defaults = bench.Options()
    verb = verbs.add_parser("bench", help="measure speed, cold start and memory")
    verb.add_argument("--out", type=Path, metavar="F", help="write the record, as JSON, to this file")
    for name in ("repetitions", "cold_starts", "prompt_tokens", "generated_tokens"):
        flag = "--" + name.replace("_", "-")
        verb.add_argument(flag, type=int, metavar="N", default=getattr(defaults, name), help="(default: %(default)s)")
    verb.set_defaults(call=_bench)
    _json_option(verb)

    known_best = tune.Options()
    verb = verbs.add_parser("tune", help="find settings that serve faster on this very machine, and the same answers")
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

    verb = verbs.add_parser("verify", help="check signature, every file and what the machine offers")
    verb.set_defaults(call=_verify, takes_folder=True)
    _signer_options(verb)
    _json_option(verb)

    verb = verbs.add_parser("doctor", help="is this machine fit for the bundle right now, and in which state")
    verb.set_defaults(call=_doctor)
    _json_option(verb)

    verb = verbs.add_parser("unpack", help="unpack another bundle's archive, once it is found whole")
    verb.add_argument("archive", type=Path, metavar="ARCHIVE", help="a .tar that `toolchain pack` made")
    verb.add_argument("into", type=Path, metavar="FOLDER", help="where the bundle's folder is to be made")
    verb.set_defaults(call=_unpack, takes_folder=True)
    _signer_options(verb)

    verb = verbs.add_parser("install", help="put a bundle in service: stage, swap, start, try, keep or go back")
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

    verb = verbs.add_parser("rollback", help="serve the release that was good before this one")
    _home_options(verb)
    verb.set_defaults(call=_rollback, takes_folder=True)
    _json_option(verb)

    verb = verbs.add_parser("status", help="say what is installed and what is served")
    _home_options(verb)
    verb.set_defaults(call=_status, takes_folder=True)
    _json_option(verb)

    verb = verbs.add_parser("gc", help="remove releases that are neither served nor needed for a rollback")
    _home_options(verb)
    verb.set_defaults(call=_gc, takes_folder=True)
    _json_option(verb)

    verb = verbs.add_parser("uninstall", help="stop the service and remove every release")
    _home_options(verb)
    verb.set_defaults(call=_uninstall, takes_folder=True)

    verb = verbs.add_parser("supervise", help="what the service runs: serve the release that is to be served")
    _home_options(verb, service=False)
    verb.set_defaults(call=_supervise, takes_folder=True)

    verb = verbs.add_parser("info", help="say what the bundle is and what this machine is")
    verb.set_defaults(call=_info)
    _json_option(verb)
    return parser


def _json_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print the record as JSON")


def _home_options(verb: argparse.ArgumentParser, *, service: bool = True) -> None:
    text = f"folder of the releases (default: {releases.default_home()})"
    verb.add_argument("--home", type=Path, default=releases.default_home(), metavar="DIR", help=text)
    if service:
        text = "what keeps the server running (default: systemd for root where it is the init, else a process)"
        verb.add_argument("--service", choices=service_module.KINDS, help=text)


def _tuned_home_option(verb: argparse.ArgumentParser) -> None:
    home = os.environ.get(releases.HOME_VARIABLE) or releases.default_home()
    text = "folder where tune keeps what it has found (default: %(default)s)"
    verb.add_argument("--home", type=Path, default=Path(home), metavar="DIR", help=text)


def _signer_options(verb: argparse.ArgumentParser) -> None:
    where = signature.MACHINE_POLICY
    text = (
        f"require a signature of one whom this file names, as in ssh-keygen(1) (default: {where}, where there is one)"
    )
    verb.add_argument("--allowed-signers", type=Path, metavar="F", help=text)
    verb.add_argument("--signer", metavar="ID", help="require the signature of this one of them")


def _say(line: str) -> None:
    """A line of progress. Nobody may be listening any more: an installation is not broken off for that."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, indent=2, ensure_ascii=False))


def _serve(bundle: files.Bundle, options: argparse.Namespace) -> int:
    found = None if options.no_tuned else tuned.find(options.home, bundle, _say)
    serve.run(bundle, host=options.host, port=options.port, key_file=options.api_key_file, tuned=found, say=_say)
    return 0


def _smoke(bundle: files.Bundle, options: argparse.Namespace) -> int:
    return _show_checks(smoke.run(bundle, _say), options.json)


def _verify(root: Path, options: argparse.Namespace) -> int:
    required = signature.policy(options.allowed_signers, options.signer)
    return _show_checks(verify.run(root, _say, required=required), options.json)


def _unpack(root: Path, options: argparse.Namespace) -> int:
    required = signature.policy(options.allowed_signers, options.signer)
    print(unpack.run(options.archive, options.into, required=required, say=_say))
    return 0


def _service(options: argparse.Namespace) -> service_module.Service:
    return service_module.find(releases.Home(options.home.absolute()), options.service)


def _install(root: Path, options: argparse.Namespace) -> int:
    changes = {name: value for name in ("host", "port") if (value := getattr(options, name)) is not None}
    if options.api_key_file is not None:
        changes["api_key_file"] = str(options.api_key_file.absolute())
    record = install.install(
        options.source if options.source is not None else root,
        _service(options),
        required=signature.policy(options.allowed_signers, options.signer),
        changes=changes,
        say=_say,
    )
    return _show_release(record, options.json)


def _rollback(root: Path, options: argparse.Namespace) -> int:
    return _show_release(install.rollback(_service(options), say=_say), options.json)


def _show_release(record: dict[str, Any], as_json: bool) -> int:
    if as_json:
        _print_json(record)
    else:
        checks = record["smoke"]["checks"]
        print(f"{record['release']} is served and good: {len(checks)} checks ok; before it: {record['previous']}")
    return 0


def _status(root: Path, options: argparse.Namespace) -> int:
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
    removed = install.gc(releases.Home(options.home.absolute()), say=_say)
    if options.json:
        _print_json({"schema_version": 1, "removed": removed})
    else:
        print("\n".join(removed) if removed else "nothing to remove")
    return 0


def _uninstall(root: Path, options: argparse.Namespace) -> int:
    install.uninstall(_service(options), say=_say)
    return 0


def _supervise(root: Path, options: argparse.Namespace) -> int:
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
    findings = doctor.examine(bundle)
    if options.json:
        _print_json(doctor.report(bundle.id, findings))
    else:
        print(doctor.table(findings))
    return 1 if doctor.unfit(findings) else 0


def _bench(bundle: files.Bundle, options: argparse.Namespace) -> int:
    asked = bench.Options(
        repetitions=options.repetitions,
        cold_starts=options.cold_starts,
        prompt_tokens=options.prompt_tokens,
        generated_tokens=options.generated_tokens,
    )
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise UsageError(f"--out {options.out}: no such folder")
    if options.out is not None and options.out.resolve().is_relative_to(bundle.root):
        raise UsageError(f"--out {options.out}: is inside the bundle, whose files are sealed", hint="write elsewhere")
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


def _tune(bundle: files.Bundle, options: argparse.Namespace) -> int:
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
