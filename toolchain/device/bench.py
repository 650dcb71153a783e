"""Measure the bundle on this machine: llama-bench, the server as a client sees it, cold starts, memory → one record.

Every sample is kept, with the conditions it was taken under. A noisy record is flagged, not dropped.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import bandwidth, files, measure, meter, probe, serve
from .errors import DeviceError, UsageError
from .measure import Record

SCHEMA_VERSION = 1
MAX_VARIATION = measure.MAX_VARIATION
MAX_FOREIGN_SHARE = meter.MAX_FOREIGN_SHARE
_MOST_CLIENTS = 64
_SHORTEST_SUSTAINED, _LONGEST_SUSTAINED = 0.5, 600
_LONGEST_COOL_DOWN_S = 3600


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    repetitions: int = 5
    """Of each figure; several clients ask at once as often."""
    cold_starts: int = 5
    """Starts with the page cache warm, and as many with it evicted."""
    prompt_tokens: int = 512
    generated_tokens: int = 128
    depth: int = 2048
    """Tokens before the long-context decode; as many as fit where the context is shorter, 0 leaves it out."""
    clients: tuple[int, ...] = (1, 2, 4)
    """How many ask at the same time; the first is always one."""
    sustained_minutes: float = 0.0
    """Answers without a pause; 0 leaves it out."""
    cool_down_s: float = 0.0
    """Pause before them: their first minute is not to be one of a device that is hot already."""

    def check(self, context: int) -> None:
        """Raises UsageError."""
        for name in ("repetitions", "cold_starts", "prompt_tokens", "generated_tokens"):
            least = 2 if name == "generated_tokens" else 1
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {getattr(self, name)}: at least {least}")
        if self.depth < 0:
            raise UsageError(f"--depth {self.depth}: at least 0")
        if not self.clients or self.clients[0] != 1 or min(self.clients) < 1 or max(self.clients) > _MOST_CLIENTS:
            shown = ",".join(map(str, self.clients))
            raise UsageError(f"--clients {shown}: numbers from 1 to {_MOST_CLIENTS}, the first of them 1")
        if self.sustained_minutes and not _SHORTEST_SUSTAINED <= self.sustained_minutes <= _LONGEST_SUSTAINED:
            raise UsageError(
                f"--sustained {self.sustained_minutes:g}: from {_SHORTEST_SUSTAINED:g} to {_LONGEST_SUSTAINED} minutes"
            )
        if not 0 <= self.cool_down_s <= _LONGEST_COOL_DOWN_S:
            raise UsageError(f"--cool-down {self.cool_down_s:g}: from 0 to {_LONGEST_COOL_DOWN_S} seconds")
        if self.prompt_tokens + self.generated_tokens > context:
            raise UsageError(
                f"{self.prompt_tokens} prompt and {self.generated_tokens} generated tokens do not fit the context",
                hint=f"the bundle serves {context} tokens: lower --prompt-tokens or --generated-tokens",
            )

    def depth_within(self, context: int) -> int:
        """The depth that a bundle's context has room for: a multiple of 128, so that records can be compared."""
        return max(0, min(self.depth, (context - self.generated_tokens) // 128 * 128))


def regime(bundle: files.Bundle) -> Options:
    """How the bundle's target is measured; of a bundle that does not say, as any is. Raises DeviceError."""
    known = asdict(Options())
    given: dict[str, Any] = bundle.presets()["bench"].get("options", {})
    for name, value in given.items():
        kinds = {int: (int,), float: (int, float), tuple: (list,)}[type(known.get(name, 0))]
        numbers = value if isinstance(value, list) else []
        if name not in known or type(value) not in kinds or not all(type(number) is int for number in numbers):
            message = f"{files.PRESETS} has a bench option {name!r}, {value!r}, that this edgectl does not know"
            raise DeviceError(message, hint="copy the bundle again")
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return replace(Options(), **plain)


def run(bundle: files.Bundle, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """The record, JSON-able. Raises DeviceError and UsageError."""
    model = bundle.manifest["model"]
    options.check(int(model["context"]) // int(model["parallel"]))
    asked = asdict(options)
    threads = serve.threads(bundle)
    before = probe.probe()
    _warn_if_busy(say)
    started, started_s = time.time(), time.monotonic()
    emulated = probe.emulated(bundle.manifest["target"]["arch"])
    record = Record(measured=emulated is None)
    say("memory bandwidth")
    with record.metered("memory bandwidth"):
        read_gb_per_s = bandwidth.read_gb_per_s(threads)
    measure.llama_bench(bundle, options, threads, record, say)
    memory = measure.as_served(bundle, options, record, say)
    eviction = measure.cold_starts(bundle, options, record, say)
    minutes = options.sustained_minutes
    if minutes and options.cool_down_s:
        say(f"cooling down: {options.cool_down_s:g} s")
        time.sleep(options.cool_down_s)
    sustained = measure.sustained(bundle, minutes, record, say) if minutes else None
    figures = {
        "device": before,
        "device_after": probe.state(),
        "throttled": record.throttled,
        "page_cache": eviction,
        "foreign_cpu_share": record.foreign,
        "memory": memory,
        "roofline": roofline(record, options, bundle, read_gb_per_s),
        "sustained": sustained,
        "metrics": record.metrics,
    }
    doubts = record.doubts() + state_doubts(figures)
    if not eviction["eviction_verified"]:
        doubts.append("the files could not be shown to have left the page cache before the evicted starts")
    return {
        "schema_version": SCHEMA_VERSION,
        "measured": emulated is None,
        "emulated": emulated,
        "conclusive": not doubts,
        "inconclusive_because": doubts,
        "bundle": bundle.id,
        "bundle_name": f"{bundle.manifest['name']} {bundle.manifest['version']}",
        "target": bundle.manifest["target"]["name"],
        "llama_cpp_commit": bundle.manifest["runtime"]["llama_cpp_commit"],
        "model": {"file": model["file"], "sha256": model["sha256"], "bytes": model["bytes"]},
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.monotonic() - started_s, 1),
        "threads": threads,
        "options": asked,
        "other_than_regime": [name for name, value in asdict(regime(bundle)).items() if value != asked[name]],
        **figures,
    }


def state_doubts(record: Mapping[str, Any]) -> list[str]:
    """What the device went through while a record was taken that speaks against all figures: throttling, another mode.

    A clock that is held down for minutes may be free again at the end, where the bench waits for the disk: every state
    in the record counts, and what is new since boot.
    """
    before, after = record.get("device") or {}, record.get("device_after") or {}
    states = [before, after, *((record.get("sustained") or {}).get("states") or [])]
    told = [state.get("throttling") or {} for state in states]
    reasons = [reason for part in told for reason in part.get("now") or []]
    reasons += [reason for part in (record.get("throttled") or {}).values() for reason in part]
    at_first, at_last = (part.get("since_boot") for part in told[:2])
    if at_first is not None and at_last is not None:
        reasons += [reason for reason in at_last if reason not in at_first]
    doubts = [f"throttled: {reason}" for reason in dict.fromkeys(reasons)]
    modes = list(dict.fromkeys(str(state["power_mode"]) for state in states if state.get("power_mode")))
    if len(modes) > 1:
        doubts.append(f"the power mode changed: {', '.join(modes)}")
    return doubts


def roofline(record: Record, options: Options, bundle: files.Bundle, read_gb_per_s: float | None) -> dict[str, Any]:
    """Decode as a share of what memory allows: each token reads the weights once. Williams et al. 2009.

    On a GPU, whose memory is another, the share is unknown.
    """
    per_token = int(bundle.manifest["model"]["bytes_per_token"])
    on_cpu = bundle.manifest["runtime"]["backend"] == "CPU"
    ceiling = read_gb_per_s * 1e9 / per_token if read_gb_per_s is not None and on_cpu else None
    decode = record.metrics[f"tg{options.generated_tokens}_tps"]["p50"]
    return {
        "measured": record.measured,
        "read_gb_per_s": read_gb_per_s,
        "bytes_per_token": per_token,
        "ceiling_tps": ceiling,
        "pct": None if ceiling is None else 100 * decode / ceiling,
    }


def _warn_if_busy(say: Callable[[str], None]) -> None:
    """Threads that wait for each other crawl when one of them has no processor to itself: say so before the wait."""
    with meter.ForeignCpu() as foreign:
        time.sleep(1)
    if foreign.share > meter.MAX_FOREIGN_SHARE:
        say(f"other programs use {foreign.share:.0%} of the processors: this will be slow, and inconclusive")


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    other = record.get("other_than_regime") or []
    lines = [
        f"{record['bundle_name']} for {record['target']}, {record['bundle'][:19]}…",
        f"{record['device']['board'] or 'unknown board'}, {record['device']['cpu'] or 'unknown processor'}, "
        f"{record['threads']} threads, governor {record['device']['governor'] or 'unknown'}, {record['started_utc']}",
        "measured as the bundle says" + (f", but for {', '.join(other)}" if other else ""),
        "",
        f"{'':<24}{'p50':>10}{'p95':>10}  {'unit':<10}{'n':>3}  variation",
    ]
    for name, metric in record["metrics"].items():
        milli = metric["unit"] == "s"
        scale, unit = (1000, "ms") if milli else (1, metric["unit"])
        lines.append(
            f"{name.removesuffix('_s') if milli else name:<24}{metric['p50'] * scale:>10.1f}"
            f"{metric['p95'] * scale:>10.1f}  {unit:<10}{len(metric['samples']):>3}  {metric['variation']:.1%}"
        )
    for name in ("peak_rss_bytes", "pss_bytes"):
        value = record["memory"][name]
        shown = "unknown" if value is None else f"{value / 2**20:.1f}"
        lines.append(f"{name.removesuffix('_bytes'):<24}{shown:>10}{'':>10}  MiB")
    roof = record["roofline"]
    if roof["pct"] is not None:
        lines.append(
            f"{'roofline':<24}{roof['pct']:>10.1f}{'':>10}  %         of {roof['ceiling_tps']:.0f} tokens/s, which "
            f"{roof['read_gb_per_s']:.1f} GB/s of memory allow"
        )
    if record["sustained"] is not None:
        ratio = record["sustained"]["last_to_first"]
        shown = "unknown" if ratio is None else f"{ratio:.3f}"
        lines.append(f"{'last ÷ first minute':<24}{shown:>10}")
    for where in ("memory", "sustained"):
        joules = (record[where] or {}).get("joules_per_generated_token")
        if joules is not None:
            name = {"memory": "energy", "sustained": "energy, sustained"}[where]
            lines.append(f"{name:<24}{joules:>10.3f}{'':>10}  J/token   {record[where]['energy_source']}")
    shares = ", ".join(f"{part} {share:.1%}" for part, share in record["foreign_cpu_share"].items())
    lines += ["", f"other programs' share of the processors: {shares}", f"eviction: {record['page_cache']['detail']}"]
    if record["emulated"]:
        lines.append(f"NOT MEASURED ON THE DEVICE: {record['emulated']}")
    lines += [f"inconclusive: {reason}" for reason in record["inconclusive_because"]] or ["conclusive"]
    return "\n".join(lines)
