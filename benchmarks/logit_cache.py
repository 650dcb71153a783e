"""Codecs for teacher logits side by side, on real logits: bytes on disk, errors, speed. Prints a Markdown table.

    python benchmarks/logit_cache.py --teacher work/teacher/…/checkpoint --rows work/select/…/train.jsonl \
        --distillkit ../DistillKit --json results.json

`--rows` left out: the answers in recipes/data/technical. DistillKit (github.com/arcee-ai/DistillKit) is imported from
the folder given; left out, so are its lines. The student is the teacher with the layers that recipes/demo.toml keeps.

KL: KL(teacher ‖ what the codec gives back), over the whole vocabulary; mass outside the entries is spread evenly.
Loss, gradient: the codec's loss against this student as its own trainer takes it, less the exact KL(teacher ‖ student);
and the mean over positions of Σ |∂loss/∂(z/T) − exact|. All at temperature T, in nats.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from toolchain.data.rows import Message, Row, read_rows
from toolchain.student import load
from toolchain.teacher import capture
from toolchain.teacher.logit_cache import Captured, Reader, Source, Writer

ROOT = Path(__file__).resolve().parents[1]
FLOOR = 1e-8
"""Least mass of a tail: DistillKit's eps."""
ROUNDS = 3


@dataclass(frozen=True)
class Target:
    """A position's distribution at T as a trainer takes it."""

    ids: torch.Tensor
    """int64 [tokens, K]"""
    p: torch.Tensor
    """float64 [tokens, K]; 0 in an empty slot"""
    tail: torch.Tensor | None
    """float64 [tokens]; None where the kept mass is renormalised to 1"""


class Codec(Protocol):
    name: str

    def write(self, folder: Path, rows: Sequence[Row], logits: Sequence[torch.Tensor]) -> None: ...

    def open(self, folder: Path, rows: Sequence[Row]) -> None: ...

    def read(self, at: int, temperature: float) -> Target: ...


class Ours:
    """toolchain.teacher.logit_cache."""

    def __init__(self, source: Source, *, stretch: int | None = None) -> None:
        self.source, self.stretch = source, stretch
        if source.selection == "sample":
            self.name = f"version 2, {source.samples} samples"
        else:
            self.name = f"version 2, k ≤ {source.top_k}, p ≥ {source.min_probability:g}, {source.value_bits} bits"
        self.name += f", ids stretched to {stretch}" if stretch else ""

    def write(self, folder: Path, rows: Sequence[Row], logits: Sequence[torch.Tensor]) -> None:
        kept = [(row.key, capture.keep([row], [part], self.source)[0]) for row, part in zip(rows, logits, strict=True)]
        source = self.source
        if self.stretch:
            wide, narrow = self.stretch, source.vocabulary
            kept = [(key, Captured(c.counts, c.ids * wide // narrow, c.values, c.tails)) for key, c in kept]
            source = replace(source, vocabulary=wide)
        writer = Writer(folder, source)
        writer.write(0, kept)
        writer.finish(1)
        shutil.rmtree(folder / "resume")

    def open(self, folder: Path, rows: Sequence[Row]) -> None:
        self.reader, self.rows = Reader(folder), rows

    def read(self, at: int, temperature: float) -> Target:
        ids, logprobs = self.reader.at_temperature(self.rows[at], temperature)
        p = torch.from_numpy(logprobs).double().exp()
        return Target(torch.from_numpy(ids), p, (1 - p.sum(-1)).clamp(min=0))


class Tensors:
    """Codecs whose rows are tensors, stored bare in one safetensors file: no overhead but the names."""

    name: str

    def pack(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def unpack(self, row: dict[str, torch.Tensor], temperature: float) -> Target:
        raise NotImplementedError

    def write(self, folder: Path, rows: Sequence[Row], logits: Sequence[torch.Tensor]) -> None:
        packed = [self.pack(part) for part in logits]
        joined = {name: torch.cat([row[name] for row in packed]) for name in packed[0]}
        lengths = {f"{name}.lengths": torch.tensor([len(row[name]) for row in packed]) for name in packed[0]}
        save_file(joined | lengths, folder / "rows.safetensors")

    def open(self, folder: Path, rows: Sequence[Row]) -> None:
        tensors = load_file(folder / "rows.safetensors")
        names = [name for name in tensors if not name.endswith(".lengths")]
        self.parts = {name: torch.split(tensors[name], tensors[f"{name}.lengths"].tolist()) for name in names}

    def read(self, at: int, temperature: float) -> Target:
        return self.unpack({name: parts[at] for name, parts in self.parts.items()}, temperature)


class CsrF16(Tensors):
    """Version 1 of our cache: ids u16, log p f16, c_T f32; k ids until top_p at T."""

    def __init__(self, temperature: float, *, top_k: int, top_p: float) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.name = f"version 1, k ≤ {top_k}, top_p {top_p:g}"

    def pack(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        values, ids = logits.topk(self.top_k, -1)
        values = values.double()
        flat = (values / self.temperature - (logits.double() / self.temperature).logsumexp(-1)[:, None]).exp()
        kept = flat.cumsum(-1) - flat < self.top_p
        stored = (values - logits.double().logsumexp(-1)[:, None]).half()
        rounded = (stored.double() / self.temperature).masked_fill(~kept, -torch.inf).logsumexp(-1)
        c = flat.masked_fill(~kept, 0).sum(-1).log() - rounded
        counts = kept.sum(-1).to(torch.int16)
        return {"counts": counts, "ids": ids[kept].to(torch.uint16), "logp": stored[kept], "c": c.float()}

    def unpack(self, row: dict[str, torch.Tensor], temperature: float) -> Target:
        counts = row["counts"].long()
        filled = torch.arange(int(counts.max())) < counts[:, None]
        ids = torch.zeros(filled.shape, dtype=torch.long)
        ids[filled] = row["ids"].long()
        p = torch.zeros(filled.shape, dtype=torch.float64)
        p[filled] = (row["logp"].double() / temperature + row["c"].double().repeat_interleave(counts)).exp()
        return Target(ids, p, (1 - p.sum(-1)).clamp(min=0))


class DistillKit(Tensors):
    """DistillKit's LogprobCompressor, and its own treatment of temperature and missing mass."""

    def __init__(self, name: str, missing: str, vocabulary: int, **config: Any) -> None:
        compression = import_module("distillkit.compression")
        plain = {"term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False}
        self.codec = compression.LogprobCompressor(
            compression.DistributionQuantizationConfig(d=vocabulary, **plain, **config)
        )
        self.missing = import_module("distillkit.missing_probability").MissingProbabilityHandling(missing)
        self.name = f"DistillKit {name}, {missing}"

    def pack(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        packed: dict[str, torch.Tensor] = self.codec.compress(logits.log_softmax(-1)[None])
        return {name: part[0] for name, part in packed.items()}

    def unpack(self, row: dict[str, torch.Tensor], temperature: float) -> Target:
        ids, values = self.codec.decompress_to_sparse({name: part[None] for name, part in row.items()})
        common = import_module("distillkit.lossfuncs.common")
        logprobs = common.get_target_logprobs(values.float(), True, temperature, 1.0, self.missing)
        p = logprobs[0].double().exp()
        tail = None if self.missing.value == "zero" else (1 - p.sum(-1)).clamp(min=FLOOR, max=1 - FLOOR)
        return Target(ids[0], p, tail)


# --- Errors.


def errors(target: Target, p: torch.Tensor, q: torch.Tensor) -> dict[str, float]:
    """Sums over the positions; `p`, `q` float64 [tokens, V]: teacher and student at T."""
    filled = target.p > 0
    given, mass = target.p, target.p.sum(-1)
    kept_p, kept_q = (torch.where(filled, part.gather(-1, target.ids), 0.0) for part in (p, q))
    missed = (1 - kept_p.sum(-1)).clamp(min=0)
    rest = (1 - kept_q.sum(-1)).clamp(min=1e-30)
    tail = torch.zeros_like(mass) if target.tail is None else target.tail
    exact = (p * (p.log() - q.log())).sum(-1)
    log_q = torch.where(filled, kept_q, 1.0).log()
    loss = (torch.xlogy(given, given) - given * log_q).sum(-1) + torch.xlogy(tail, tail) - tail * rest.log()
    # ∂/∂(z/T) of Σ p̂ log(p̂/q) + t log(t/Q_rest) is (Σp̂ + t)·q − p̂ on the entries and (Σp̂ + t − t/Q_rest)·q elsewhere.
    whole = (mass + tail)[:, None]
    elsewhere = whole - (tail / rest)[:, None]
    off = (p - q * (1 - elsewhere)).abs_().sum(-1)
    off -= torch.where(filled, (kept_p - kept_q * (1 - elsewhere)).abs(), 0.0).sum(-1)
    on = torch.where(filled, (whole * kept_q - given - kept_q + kept_p).abs(), 0.0).sum(-1)
    found = {
        "tail": float(missed.sum()),
        "loss": float((loss - exact).sum()),
        "gradient": float((on + off).sum()),
        "entries": float(filled.sum()),
    }
    if target.tail is not None:
        spread = tail.clamp(min=FLOOR) / (p.shape[-1] - filled.sum(-1)).clamp(min=1)
        total = mass + tail.clamp(min=FLOOR)
        log_given = torch.where(filled, given, 1.0).log()
        cross = (kept_p * log_given).sum(-1) + missed * spread.log() - total.log()
        found["kl"] = float((torch.xlogy(p, p).sum(-1) - cross).sum())
    return found


def check_against_distillkit(codec: "DistillKit", at: int, z: torch.Tensor, temperature: float) -> None:
    """The gradient above is that of DistillKit's own loss."""
    inner = import_module("distillkit.lossfuncs.kl").sparse_kl_div_inner
    row = {name: parts[at][None] for name, parts in codec.parts.items()}
    ids, values = codec.codec.decompress_to_sparse(row)
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        inner(z[None], ids, values.float(), missing=codec.missing, temperature=temperature).backward()
    target, q = codec.read(at, temperature), (z.detach().double() / temperature).softmax(-1)
    dense = torch.zeros_like(q).scatter_add_(-1, target.ids, target.p)
    tail = target.tail if target.tail is not None else torch.zeros(len(q), dtype=q.dtype)
    rest = q.scatter(-1, target.ids, 0.0)
    ours = (target.p.sum(-1) + tail)[:, None] * q - dense - rest * (tail / rest.sum(-1))[:, None]
    assert z.grad is not None
    difference = (z.grad.double() * temperature - ours).abs().sum(-1)
    # Where its kept mass is near 1, its student's remainder is 1 − Σ in float32, and less exact.
    assert float(difference.median()) < 1e-3, f"DistillKit's gradient differs by {float(difference.median())}"


# --- Data.


def technical_rows(tokenizer: Any, folder: Path) -> list[Row]:
    rows = []
    for number, line in enumerate((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()):
        raw = json.loads(line)
        question, answer = raw["question"], raw["answer"]
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer)]
        rows.append(Row(str(number), (Message("user", question),), answer, ids[0], ids[1], "length"))
    return rows


def choose(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Rows from all over the file, with at least that many answer tokens."""
    mean = sum(len(row.answer_ids) for row in rows) / len(rows)
    step = max(1, int(len(rows) * mean / tokens))
    return list({row.key: row for row in rows[::step]}.values())


def sources(temperature: float, vocabulary: int) -> list[Source]:
    base = Source("", "", "", vocabulary, (temperature,), "top", 256, 0.999, 0.002, 7, 50)
    frontier = [replace(base, min_probability=p) for p in (0.0, 0.0005, 0.001, 0.002, 0.004)]
    frontier += [replace(base, value_bits=bits) for bits in (4, 5, 6, 8)]
    frontier += [replace(base, min_probability=0.0, top_k=k) for k in (12, 50, 64)]
    return frontier + [replace(base, selection="sample", samples=n) for n in (50, 200)]


def codecs(temperature: float, vocabulary: int, *, distillkit: bool) -> list[Codec]:
    made: list[Codec] = [Ours(source) for source in sources(temperature, vocabulary)]
    made += [Ours(sources(temperature, vocabulary)[3], stretch=151_936)]
    made += [CsrF16(temperature, top_k=64, top_p=0.999)]
    if distillkit:
        budget: dict[str, Any] = {"k": 50, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"]}
        terms = [0, 1, 2, 3, 4, "sqrt"]
        large: dict[str, Any] = {"k": 128, "exact_k": 16, "exact_dtype": "bfloat16", "polynomial_terms": terms}
        exact: dict[str, Any] = {"k": 50, "exact_k": 50, "exact_dtype": "bfloat16", "polynomial_terms": None}
        for name, config in (("budget (k = 50)", budget), ("recommended (k = 128)", large), ("k = 50, bf16", exact)):
            made += [DistillKit(name, missing, vocabulary, **config) for missing in ("symmetric_uniform", "zero")]
    return made


# --- The run.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--distillkit", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--timed-rows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.distillkit:
        sys.path.insert(0, str(options.distillkit))
    model, tokenizer = load.load_model(options.teacher, dtype=torch.float32, device="cpu")
    found = read_rows(options.rows) if options.rows else technical_rows(tokenizer, ROOT / "recipes/data/technical")
    rows = choose(found, options.tokens)
    head = load.head_of(model)
    layers = tomllib.loads((ROOT / "recipes/demo.toml").read_text(encoding="utf-8"))["student"]["keep_layers"]
    with torch.no_grad():
        teacher = [next(load.answer_states(model, [row])) for row in rows]
        model.model.layers = torch.nn.ModuleList([model.model.layers[at] for at in layers])
        student = [next(load.answer_states(model, [row])) for row in rows]
        tokens = sum(len(row.answer_ids) for row in rows)
        print(f"{tokens} answer tokens in {len(rows)} rows, vocabulary {head.vocabulary}, torch {torch.__version__}\n")
        results = [
            result
            for temperature in (1.0, 2.0)
            for result in measure(temperature, rows, teacher, student, head, options, tokens)
        ]
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(
    temperature: float,
    rows: list[Row],
    teacher: list[torch.Tensor],
    student: list[torch.Tensor],
    head: load.Head,
    options: argparse.Namespace,
    tokens: int,
) -> list[dict[str, Any]]:
    made = codecs(temperature, head.vocabulary, distillkit=options.distillkit is not None)
    results: list[dict[str, Any]] = [{"T": temperature, "codec": codec.name} for codec in made]
    with tempfile.TemporaryDirectory() as name:
        logits = [head(state) for state in teacher]
        for number, codec in enumerate(made):
            folder = Path(name) / str(number)
            folder.mkdir()
            codec.write(folder, rows, logits)
            codec.open(folder, rows)
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            results[number]["bytes"] = sum(sizes.values()) / tokens
            results[number]["bytes_aside"] = (
                sum(size for file, size in sizes.items() if file.startswith(("codebook", "index"))) / tokens
            )
            if isinstance(codec, DistillKit):
                check_against_distillkit(codec, 0, head(student[0]), temperature)
        for at, state in enumerate(student):
            p = (logits[at].double() / temperature).softmax(-1)
            q = (head(state).double() / temperature).softmax(-1)
            for codec, result in zip(made, results, strict=True):
                if isinstance(codec, Ours) and codec.stretch:
                    continue
                for key, value in errors(codec.read(at, temperature), p, q).items():
                    result[key] = result.get(key, 0.0) + value / tokens
        speeds(made, results, rows[: options.timed_rows], logits[: options.timed_rows], temperature, Path(name))
    return results


def speeds(
    made: list[Codec],
    results: list[dict[str, Any]],
    rows: list[Row],
    logits: list[torch.Tensor],
    temperature: float,
    folder: Path,
) -> None:
    """Write and read, one codec after the other in each round, so that a busy machine slows them alike."""
    tokens = sum(len(row.answer_ids) for row in rows)
    seconds: dict[tuple[int, str], list[float]] = {}
    for turn in range(ROUNDS):
        for number, codec in enumerate(made):
            out = folder / f"{turn}-{number}"
            out.mkdir()
            started = time.perf_counter()
            codec.write(out, rows, logits)
            written = time.perf_counter()
            codec.open(out, rows)
            codec.read(0, temperature)
            opened = time.perf_counter()
            for at in range(len(rows)):
                codec.read(at, temperature)
            seconds.setdefault((number, "write"), []).append(written - started)
            seconds.setdefault((number, "read"), []).append(time.perf_counter() - opened)
    for (number, kind), taken in seconds.items():
        results[number][f"{kind}_tokens_per_second"] = tokens / median(taken)


def show(results: list[dict[str, Any]]) -> None:
    columns = ("bytes", "bytes_aside", "entries", "tail", "kl", "loss", "gradient")
    print(f"| T | codec | {' | '.join(columns)} | write, tokens/s | read, tokens/s |")
    print("|---" * (len(columns) + 4) + "|")
    for result in results:
        cells = [f"{result[name]:.4g}" if name in result else "" for name in columns]
        cells += [f"{result[f'{kind}_tokens_per_second']:,.0f}" for kind in ("write", "read")]
        print(f"| {result['T']:g} | {result['codec']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    torch.set_num_threads(1)
    main()
