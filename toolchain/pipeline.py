"""The stages in order: what each needs, what of the recipe it can read, and the function that does it.

Heavy libraries are imported inside the adaptors below, which run in a process of their own (toolchain/worker.py).
Whether a stage is reused, resumed or run is decided in toolchain/runner.py.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from toolchain.artifact import CHECKPOINT, LOGS, open_artifact
from toolchain.errors import ArtifactError, HostError, RecipeError
from toolchain.evaluate.gates import GateLimits, check_gates
from toolchain.recipe import (
    Base,
    Bench,
    Capture,
    Card,
    Compare,
    Data,
    Distill,
    Endpoint,
    Generate,
    Imatrix,
    Merge,
    OnPolicy,
    Quantize,
    Recipe,
    Select,
    Student,
    Teacher,
)
from toolchain.reporter import Reporter
from toolchain.settings import Settings
from toolchain.target import TargetProfile, read_target

if TYPE_CHECKING:
    from toolchain.gguf.llama_cpp import LlamaCpp

Inputs = Mapping[str, Path]
Metrics = dict[str, Any]
HOST_TARGETS = {"x86_64": "x86-cpu"}


@dataclass(frozen=True)
class Made:
    """An input that another stage makes: a file or folder of its artifact."""

    stage: str
    part: str


@dataclass(frozen=True)
class TokenizerOf:
    """The tokenizer in a stage's checkpoint: a change of the weights alone does not count."""

    stage: str


Source = Made | TokenizerOf | Path


@dataclass(frozen=True)
class Stage:
    """One step of the way. `settings` is everything of the recipe that `run` can read, and all of it is hashed."""

    name: str
    run: Callable[[Any, Inputs, Path, Reporter], Metrics]
    settings_type: type[Settings]
    settings: Callable[[Recipe, TargetProfile | None], Settings]
    inputs: Callable[[Recipe], dict[str, Source]]
    version: int = 1
    per_target: bool = False
    on_device: bool = False
    """Whether it runs the bundle, which only a machine like the target can."""
    uses_llama_cpp: Callable[[Recipe], bool] = lambda _: False
    wanted: Callable[[Recipe], bool] = lambda _: True
    """Whether the way of this recipe goes through the stage."""
    parallel: bool = False
    """Whether several processes may share the work."""

    def run_job(self, settings: dict[str, Any], inputs: Inputs, out: Path, report: Reporter) -> Metrics:
        """What the worker calls: settings as JSON gave them."""
        typed = self.settings_type.model_validate_json(json.dumps(settings))
        return self.run(typed, inputs, out, report)


# -- settings of stages that read more than one table of the recipe --------------------------------------------------


class StudentSettings(Settings):
    student: Student
    from_teacher: bool
    context: int
    max_length: int


class RehearsalSettings(Settings):
    cmake: dict[str, str | bool]


class VocabularySettings(Settings):
    method: Literal["logits", "answers", "uld"]
    on_policy: bool


class GenerateSettings(Settings):
    generate: Generate
    data: Data
    endpoint: Endpoint | None
    load_in_4bit: bool
    seed: int
    cmake: dict[str, str | bool] | None
    """Of the llama.cpp build that runs a .gguf teacher; None for other teachers."""


class SelectSettings(Settings):
    select: Select
    data: Data
    max_new_tokens: int


class CaptureSettings(Settings):
    capture: Capture
    temperatures: tuple[float, ...]
    load_in_4bit: bool
    cmake: dict[str, str | bool] | None


class DistillSettings(Settings):
    distill: Distill
    max_length: int
    seed: int


class OnPolicySettings(Settings):
    on_policy: OnPolicy
    distill: Distill
    load_teacher_in_4bit: bool
    max_length: int
    seed: int


class MergeSettings(Settings):
    merge: Merge
    load_in_4bit: bool
    """Whether the adapter was trained on the base in 4 bits."""


class CompareSettings(Settings):
    compare: Compare
    data: Data
    generate: Generate
    seed: int


class ConvertSettings(Settings):
    name: str
    version: str
    card: Card
    max_kl: float
    cmake: dict[str, str | bool]


class ImatrixSettings(Settings):
    imatrix: Imatrix
    cmake: dict[str, str | bool]


class QuantizeSettings(Settings):
    quantize: Quantize
    cmake: dict[str, str | bool]


class EvaluateSettings(Settings):
    batch_tokens: int
    load_teacher_in_4bit: bool
    cmake: dict[str, str | bool]


class BundleStageSettings(Settings):
    name: str
    version: str
    context: int
    system: str | None
    target: TargetProfile
    gates: GateLimits
    lineage: dict[str, str] = Field(default_factory=dict)


class SmokeSettings(Settings):
    target: str


class BenchSettings(Settings):
    bench: Bench
    target: str
    host: dict[str, str]


class FormsSettings(Settings):
    forms: tuple[str, ...]
    arch: str


def without_paths(value: Any) -> Any:
    """The same settings with every path blank: where a file lies is not part of what is asked for, its digest is."""
    if isinstance(value, Settings):
        return value.model_copy(
            update={
                name: Path() if isinstance(item, Path) else without_paths(item)
                for name in type(value).model_fields
                if isinstance(item := getattr(value, name), Path | Settings)
            }
        )
    return value


def host_target() -> TargetProfile:
    """The target whose runtime also serves as this host's llama.cpp tools: one build in all."""
    machine = platform.machine()
    if machine not in HOST_TARGETS:
        raise HostError(f"no llama.cpp build is defined for a {machine} host", hint="use an x86-64 Linux host")
    return read_target(HOST_TARGETS[machine])


def host_cmake() -> dict[str, str | bool]:
    return dict(host_target().runtime.cmake)


# -- adaptors: settings and inputs → the stage's own function, in the worker -----------------------------------------


def _teacher(settings: Teacher, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.teacher import checkpoint

    return checkpoint.prepare(settings, model=inputs["model"], out=out, report=report)


def _student(settings: StudentSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.student import base
    from toolchain.student.checkpoint_files import read_config

    # Said here, before hours of training, and not when the bundle is built.
    positions = read_config(inputs["model"]).get("max_position_embeddings")
    for key, tokens in (("bundle.context", settings.context), ("data.max_length", settings.max_length)):
        if isinstance(positions, int) and tokens > positions:
            raise RecipeError(f"{key} is {tokens}, the student was made for {positions} tokens", hint=f"lower {key}")
    metrics = base.prepare(settings.student, model=inputs["model"], out=out, report=report)
    return metrics | _rehearsed(out, report)


def _rehearsed(student: Path, report: Reporter) -> Metrics:
    """What the rehearsal says, in a process of its own: torch is in this one."""
    from toolchain.gguf import llama_cpp
    from toolchain.student.load import resolve
    from toolchain.worker import run_in_worker

    settings = RehearsalSettings(cmake=host_cmake())
    try:
        llama_cpp.find(settings.cmake)
    except HostError:
        # Nobody is to build it for the training alone. Whoever converts here has been told before the first stage.
        report.line("no llama.cpp here: whether it knows such a model is found out where it is converted")
        return {}
    job = {
        "stage": REHEARSAL.name,
        "settings": settings.model_dump(mode="json"),
        "inputs": {"model": str(resolve(student))},
        "out": str(student),
    }
    return run_in_worker(job, log=student / LOGS / "rehearsal.log", report=report)


def _rehearsal(settings: RehearsalSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.gguf import convert, llama_cpp

    texts = convert.rehearse(inputs["model"], llama=llama_cpp.find(settings.cmake), report=report)
    return {"texts_as_llama_cpp_reads_them": texts}


def _vocabulary(settings: VocabularySettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.student import vocabulary

    return vocabulary.run(
        method=settings.method,
        on_policy=settings.on_policy,
        teacher=inputs.get("teacher"),
        student=inputs["student"],
        out=out,
    )


def _generate(settings: GenerateSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.teacher import generate

    return generate.run(
        settings.generate,
        settings.data,
        seed=settings.seed,
        teacher=inputs.get("teacher"),
        gguf=inputs.get("gguf"),
        endpoint=settings.endpoint,
        load_in_4bit=settings.load_in_4bit,
        llama=_llama(settings.cmake),
        train=inputs["train"],
        held_out=inputs["held_out"],
        out=out,
        report=report,
    )


def _select(settings: SelectSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.teacher import select

    return select.run(
        settings.select,
        settings.data,
        max_new_tokens=settings.max_new_tokens,
        answers=inputs["answers"],
        student=inputs["student"],
        vocabulary=inputs["vocabulary"],
        embedding_model=inputs.get("embedding_model"),
        out=out,
        report=report,
    )


def _capture(settings: CaptureSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.teacher import capture

    return capture.run(
        settings.capture,
        temperatures=settings.temperatures,
        teacher=inputs["teacher"],
        gguf=inputs.get("gguf"),
        load_in_4bit=settings.load_in_4bit,
        llama=_llama(settings.cmake),
        vocabulary=inputs["vocabulary"],
        rows=inputs["rows"],
        out=out,
        report=report,
    )


def _distill(settings: DistillSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    if settings.distill.method == "uld":
        from toolchain.student import uld

        return uld.run(
            settings.distill,
            max_length=settings.max_length,
            seed=settings.seed,
            teacher=inputs["teacher"],
            base=inputs["base"],
            rows=inputs["rows"],
            out=out,
            report=report,
        )
    # Unsloth is imported before what it patches.
    from toolchain.student.engine import choose

    engine = choose(settings.distill.engine)
    from toolchain.student import distill

    return distill.run(
        settings.distill,
        engine=engine,
        max_length=settings.max_length,
        seed=settings.seed,
        base=inputs["base"],
        rows=inputs["rows"],
        logits=inputs.get("logits"),
        out=out,
        report=report,
    )


def _on_policy(settings: OnPolicySettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.student import on_policy

    return on_policy.run(
        settings.on_policy,
        settings.distill,
        load_teacher_in_4bit=settings.load_teacher_in_4bit,
        max_length=settings.max_length,
        seed=settings.seed,
        teacher=inputs["teacher"],
        base=inputs["base"],
        adapter=inputs["adapter"],
        rows=inputs["rows"],
        out=out,
        report=report,
    )


def _merge(settings: MergeSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.student import merge

    return merge.run(
        settings.merge,
        load_in_4bit=settings.load_in_4bit,
        base=inputs["base"],
        adapter=inputs["adapter"],
        held_out=inputs["held_out"],
        out=out,
        report=report,
    )


def _compare(settings: CompareSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.evaluate import compare

    return compare.run(
        settings.compare,
        settings.data,
        settings.generate,
        seed=settings.seed,
        held_out=inputs["held_out"],
        teacher=inputs.get("teacher"),
        student=inputs["student"],
        merged=inputs["merged"],
        embedding_model=inputs.get("embedding_model"),
        out_of_domain=inputs.get("out_of_domain"),
        out=out,
        report=report,
    )


def _convert(settings: ConvertSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.gguf import convert, llama_cpp

    llama = llama_cpp.find(settings.cmake)
    return convert.run(
        settings.card,
        model=inputs["model"],
        name=settings.name,
        version=settings.version,
        max_kl=settings.max_kl,
        llama=llama,
        out=out,
        report=report,
    )


def _imatrix(settings: ImatrixSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.gguf import imatrix, llama_cpp

    return imatrix.run(
        settings.imatrix,
        gguf=inputs["gguf"],
        rows=inputs["rows"],
        tokenizer=inputs["tokenizer"],
        given=inputs.get("given"),
        llama=llama_cpp.find(settings.cmake),
        out=out,
        report=report,
    )


def _quantize(settings: QuantizeSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.gguf import llama_cpp, quantize

    llama = llama_cpp.find(settings.cmake)
    return quantize.run(settings.quantize, quantize.Inputs(**inputs), llama=llama, out=out, report=report)


def _evaluate(settings: EvaluateSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.evaluate import ledger
    from toolchain.gguf import llama_cpp

    return ledger.run(
        batch_tokens=settings.batch_tokens,
        load_teacher_in_4bit=settings.load_teacher_in_4bit,
        inputs=inputs,
        llama=llama_cpp.find(settings.cmake),
        out=out,
        report=report,
    )


def _bundle(settings: BundleStageSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.bundle import build
    from toolchain.data.rows import read_rows
    from toolchain.gguf import llama_cpp

    ledger = json.loads(inputs["ledger"].read_text(encoding="utf-8"))
    # Questions that the teacher answered to the end come first: the smoke test expects most answers to end.
    held_out = sorted(read_rows(inputs["golden"]), key=lambda row: row.finish != "stop")
    golden = [
        {"messages": [turn.as_dict() for turn in row.messages], "prompt_ids": list(row.prompt_ids)}
        for row in held_out[:GOLDEN_PROMPTS]
    ]
    gates = [gate.as_dict() for gate in check_gates(ledger, settings.gates)]
    return build.run(
        build.BundleSettings(
            name=settings.name, version=settings.version, context=settings.context, system=settings.system
        ),
        target=settings.target,
        gguf=inputs["gguf"],
        quantize_facts=json.loads(inputs["quantize_facts"].read_text(encoding="utf-8")),
        ledger={**ledger, "gates": gates},
        golden=golden,
        lineage=settings.lineage,
        llama=llama_cpp.find(settings.target.runtime.cmake),
        # What is for another processor, or a GPU, may not run here: the same source, built for this host, answers.
        answering=llama_cpp.find(host_cmake()),
        out=out,
        report=report,
        gguf_sha256=open_artifact(inputs["gguf"].parent).manifest.files[inputs["gguf"].name].sha256,
    )


def _smoke(settings: SmokeSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.bundle import onhost

    return onhost.smoke(bundle_of(inputs["bundle"]), out=out, report=report)


def _bench(settings: BenchSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.bundle import onhost

    return onhost.bench(settings.bench, bundle_of(inputs["bundle"]), out=out, report=report)


def _forms(settings: FormsSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.bundle import forms

    base = inputs.get(f"base_{settings.arch}")
    return forms.run(settings.forms, bundle=bundle_of(inputs["bundle"]), base=base, out=out, report=report)


GOLDEN_PROMPTS = 8


def bundle_of(artifact: Path) -> Path:
    """The bundle directory inside a `bundle` artifact."""
    found = [path for path in artifact.iterdir() if path.is_dir()]
    if len(found) != 1:
        raise ArtifactError(f"{artifact}: holds {len(found)} bundles, not one", hint="remove it and run `bundle` again")
    return found[0]


def _llama(cmake: dict[str, str | bool] | None) -> "LlamaCpp | None":
    if cmake is None:
        return None
    from toolchain.gguf import llama_cpp

    return llama_cpp.find(cmake)


def _given(**sources: Source | None) -> dict[str, Source]:
    """The inputs that this recipe has."""
    return {name: source for name, source in sources.items() if source is not None}


def _runs_gguf(recipe: Recipe) -> bool:
    return recipe.teacher.engine == "llama.cpp"


def _local_teacher(recipe: Recipe) -> Source | None:
    return Made("teacher", CHECKPOINT) if recipe.teacher.model is not None else None


def _gguf_teacher(recipe: Recipe) -> Source | None:
    return recipe.teacher.model if _runs_gguf(recipe) else None


def _teacher_cmake(recipe: Recipe) -> dict[str, str | bool] | None:
    return host_cmake() if _runs_gguf(recipe) else None


def _answers_teacher(recipe: Recipe) -> Source | None:
    """The local model that answers; an endpoint answers in its stead, and a data set needs none."""
    asks = recipe.generate.answers == "teacher" and recipe.teacher.endpoint is None
    return _local_teacher(recipe) if asks else None


def _adapter(recipe: Recipe) -> Source:
    return Made("on_policy" if recipe.on_policy.steps else "distill", "adapter")


def _student_source(recipe: Recipe) -> Source:
    return recipe.student.model if recipe.student.model is not None else Made("teacher", CHECKPOINT)


def _distill_inputs(recipe: Recipe) -> dict[str, Source]:
    return _given(
        base=Made("student", CHECKPOINT),
        rows=Made("select", "train.jsonl"),
        logits=Made("capture", "") if recipe.distill.uses_logits else None,
        teacher=Made("teacher", CHECKPOINT) if recipe.distill.method == "uld" else None,
    )


def _quantize_inputs(recipe: Recipe) -> dict[str, Source]:
    searches = recipe.quantize.allocation == "error-aware"
    return _given(
        gguf=Made("convert", "model-f16.gguf"),
        imatrix=Made("imatrix", "imatrix.gguf"),
        train=Made("select", "train.jsonl") if searches else None,
        held_out=Made("select", "held_out.jsonl") if searches else None,
        plan=recipe.quantize.plan,
    )


def gate_limits(recipe: Recipe) -> GateLimits:
    return GateLimits(
        distill_max_kl_ratio=recipe.evaluate.max_kl_ratio,
        distill_max_ce_ratio=recipe.evaluate.max_ce_ratio,
        merge_max_kl=recipe.merge.max_kl,
        convert_max_kl=recipe.convert.max_kl,
    )


def _target(target: TargetProfile | None) -> TargetProfile:
    assert target is not None
    return target


def _host_facts() -> dict[str, str]:
    from toolchain.device import cores, probe

    return {
        "board": str(probe.board()),
        "cpu": str(probe.cpu_model()),
        "cpus": str(len(cores.usable_cpus())),
        "memory_gib": str(probe.memory_bytes() >> 30),
    }


STAGES: tuple[Stage, ...] = (
    Stage(
        "teacher",
        _teacher,
        Teacher,
        settings=lambda recipe, _: recipe.teacher.model_copy(update={"endpoint": None, "load_in_4bit": False}),
        inputs=lambda recipe: _given(model=recipe.teacher.model),
        version=2,
        wanted=lambda recipe: recipe.teacher.model is not None,
    ),
    Stage(
        "student",
        _student,
        StudentSettings,
        settings=lambda recipe, _: StudentSettings(
            student=recipe.student,
            from_teacher=recipe.student.model is None,
            context=recipe.bundle.context,
            max_length=recipe.data.max_length,
        ),
        inputs=lambda recipe: {"model": _student_source(recipe)},
    ),
    Stage(
        "vocabulary",
        _vocabulary,
        VocabularySettings,
        settings=lambda recipe, _: VocabularySettings(
            method=recipe.distill.method, on_policy=recipe.on_policy.steps > 0
        ),
        inputs=lambda recipe: _given(teacher=_local_teacher(recipe), student=Made("student", CHECKPOINT)),
    ),
    Stage(
        "generate",
        _generate,
        GenerateSettings,
        settings=lambda recipe, _: GenerateSettings(
            generate=recipe.generate,
            # What decides which answers become rows is for `select`: another limit asks nothing anew.
            data=Data(
                train=recipe.data.train,
                held_out=recipe.data.held_out,
                format=recipe.data.format,
                system=recipe.data.system,
            ),
            endpoint=recipe.teacher.endpoint,
            load_in_4bit=recipe.teacher.load_in_4bit,
            seed=recipe.seed,
            cmake=_teacher_cmake(recipe),
        ),
        inputs=lambda recipe: _given(
            teacher=_answers_teacher(recipe),
            gguf=_gguf_teacher(recipe),
            train=recipe.data.train,
            held_out=recipe.data.held_out,
        ),
        uses_llama_cpp=_runs_gguf,
    ),
    Stage(
        "select",
        _select,
        SelectSettings,
        settings=lambda recipe, _: SelectSettings(
            select=recipe.select, data=recipe.data, max_new_tokens=recipe.generate.max_new_tokens
        ),
        inputs=lambda recipe: _given(
            answers=Made("generate", "answers.jsonl"),
            student=TokenizerOf("student"),
            vocabulary=Made("vocabulary", "vocabulary.json"),
            embedding_model=recipe.select.embedding_model,
        ),
    ),
    Stage(
        "capture",
        _capture,
        CaptureSettings,
        settings=lambda recipe, _: CaptureSettings(
            capture=recipe.capture,
            temperatures=recipe.capture_temperatures,
            load_in_4bit=recipe.teacher.load_in_4bit,
            cmake=_teacher_cmake(recipe),
        ),
        inputs=lambda recipe: _given(
            teacher=_local_teacher(recipe),
            gguf=_gguf_teacher(recipe),
            vocabulary=Made("vocabulary", "vocabulary.json"),
            rows=Made("select", "train.jsonl"),
        ),
        uses_llama_cpp=_runs_gguf,
        version=2,
        wanted=lambda recipe: recipe.distill.uses_logits,
        parallel=True,
    ),
    Stage(
        "distill",
        _distill,
        DistillSettings,
        settings=lambda recipe, _: DistillSettings(
            distill=recipe.distill, max_length=recipe.data.max_length, seed=recipe.seed
        ),
        inputs=_distill_inputs,
        parallel=True,
    ),
    Stage(
        "on_policy",
        _on_policy,
        OnPolicySettings,
        settings=lambda recipe, _: OnPolicySettings(
            on_policy=recipe.on_policy,
            distill=recipe.distill,
            load_teacher_in_4bit=recipe.teacher.load_in_4bit,
            max_length=recipe.data.max_length,
            seed=recipe.seed,
        ),
        inputs=lambda recipe: _given(
            teacher=_local_teacher(recipe),
            base=Made("student", CHECKPOINT),
            adapter=Made("distill", "adapter"),
            rows=Made("select", "train.jsonl"),
        ),
        wanted=lambda recipe: recipe.on_policy.steps > 0,
    ),
    Stage(
        "merge",
        _merge,
        MergeSettings,
        settings=lambda recipe, _: MergeSettings(merge=recipe.merge, load_in_4bit=recipe.distill.load_in_4bit),
        inputs=lambda recipe: {
            "base": Made("student", CHECKPOINT),
            "adapter": _adapter(recipe),
            "held_out": Made("select", "held_out.jsonl"),
        },
    ),
    Stage(
        "compare",
        _compare,
        CompareSettings,
        settings=lambda recipe, _: CompareSettings(
            compare=recipe.compare, data=recipe.data, generate=recipe.generate, seed=recipe.seed
        ),
        inputs=lambda recipe: _given(
            held_out=Made("select", "held_out.jsonl"),
            # For its latency alone: not where it may not fit in 16 bits.
            teacher=None if _runs_gguf(recipe) or recipe.teacher.load_in_4bit else _local_teacher(recipe),
            student=Made("student", CHECKPOINT),
            merged=Made("merge", CHECKPOINT),
            embedding_model=recipe.compare.embedding_model,
            out_of_domain=recipe.compare.out_of_domain,
        ),
        wanted=lambda recipe: recipe.compare.enabled,
    ),
    Stage(
        "convert",
        _convert,
        ConvertSettings,
        settings=lambda recipe, _: ConvertSettings(
            name=recipe.name,
            version=recipe.version,
            card=recipe.card,
            max_kl=recipe.convert.max_kl,
            cmake=host_cmake(),
        ),
        inputs=lambda recipe: {"model": Made("merge", CHECKPOINT)},
        uses_llama_cpp=lambda _: True,
    ),
    Stage(
        "imatrix",
        _imatrix,
        ImatrixSettings,
        settings=lambda recipe, _: ImatrixSettings(imatrix=recipe.imatrix, cmake=host_cmake()),
        inputs=lambda recipe: _given(
            gguf=Made("convert", "model-f16.gguf"),
            rows=Made("select", "train.jsonl"),
            tokenizer=TokenizerOf("merge"),
            given=recipe.imatrix.file,
        ),
        uses_llama_cpp=lambda _: True,
    ),
    Stage(
        "quantize",
        _quantize,
        QuantizeSettings,
        settings=lambda recipe, _: QuantizeSettings(quantize=recipe.quantize, cmake=host_cmake()),
        inputs=_quantize_inputs,
        uses_llama_cpp=lambda _: True,
        version=3,
    ),
    Stage(
        "evaluate",
        _evaluate,
        EvaluateSettings,
        settings=lambda recipe, _: EvaluateSettings(
            batch_tokens=recipe.evaluate.batch_tokens,
            load_teacher_in_4bit=recipe.teacher.load_in_4bit,
            cmake=host_cmake(),
        ),
        inputs=lambda recipe: _given(
            held_out=Made("select", "held_out.jsonl"),
            vocabulary=Made("vocabulary", "vocabulary.json"),
            teacher=_local_teacher(recipe),
            gguf_teacher=_gguf_teacher(recipe),
            student=Made("student", CHECKPOINT),
            adapter=_adapter(recipe),
            merged=Made("merge", CHECKPOINT),
            gguf_16bit=Made("convert", "model-f16.gguf"),
            gguf_quantized=Made("quantize", "model.gguf"),
            quantize_facts=Made("quantize", "quantize.json"),
        ),
        uses_llama_cpp=lambda _: True,
    ),
    Stage(
        "bundle",
        _bundle,
        BundleStageSettings,
        settings=lambda recipe, target: BundleStageSettings(
            name=recipe.name,
            version=recipe.version,
            context=recipe.bundle.context,
            system=recipe.data.system,
            target=_target(target),
            gates=gate_limits(recipe),
        ),
        inputs=lambda recipe: {
            "gguf": Made("quantize", "model.gguf"),
            "quantize_facts": Made("quantize", "quantize.json"),
            "ledger": Made("evaluate", "ledger.json"),
            "golden": Made("select", "held_out.jsonl"),
        },
        per_target=True,
        uses_llama_cpp=lambda _: True,
        version=4,
    ),
    Stage(
        "smoke",
        _smoke,
        SmokeSettings,
        settings=lambda recipe, target: SmokeSettings(target=_target(target).name),
        inputs=lambda recipe: {"bundle": Made("bundle", "")},
        per_target=True,
        on_device=True,
    ),
    Stage(
        "bench",
        _bench,
        BenchSettings,
        settings=lambda recipe, target: BenchSettings(
            bench=recipe.bench.or_else(_target(target).bench), target=_target(target).name, host=_host_facts()
        ),
        inputs=lambda recipe: {"bundle": Made("bundle", "")},
        per_target=True,
        on_device=True,
        version=2,
    ),
    # Last: where the bundle can be tried, only what passed is packed.
    Stage(
        "forms",
        _forms,
        FormsSettings,
        settings=lambda recipe, target: FormsSettings(forms=recipe.bundle.forms, arch=_target(target).arch),
        inputs=lambda recipe: _given(
            bundle=Made("bundle", ""),
            base_x86_64=(recipe.bundle.base or Base()).x86_64,
            base_aarch64=(recipe.bundle.base or Base()).aarch64,
        ),
        per_target=True,
        wanted=lambda recipe: recipe.bundle.forms != (),
    ),
)
REHEARSAL = Stage(
    "rehearsal",
    _rehearsal,
    RehearsalSettings,
    settings=lambda _recipe, _target: RehearsalSettings(cmake=host_cmake()),
    inputs=lambda _: {},
)
"""Of the conversion; not a stage of its own but the end of `student`."""
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_called(name: str) -> Stage:
    """The stage of that name. Raises RecipeError."""
    for stage in (*STAGES, REHEARSAL):
        if stage.name == name:
            return stage
    raise RecipeError(f"no stage '{name}'", hint=f"stages: {', '.join(STAGE_NAMES)}")


@dataclass(frozen=True)
class Step:
    """A stage, and the target it is for when it has one."""

    stage: Stage
    target: TargetProfile | None = None

    @property
    def name(self) -> str:
        return f"{self.stage.name}[{self.target.name}]" if self.target else self.stage.name

    @property
    def folder(self) -> str:
        return f"{self.stage.name}-{self.target.name}" if self.target else self.stage.name


def steps(recipe: Recipe, targets: tuple[str, ...] | None = None) -> list[Step]:
    """Every step of a recipe, in order; `targets` narrows those of the recipe.

    What has to run on a device is left out for one that this host is not like.
    """
    profiles = [read_target(name) for name in (targets or recipe.bundle.targets)]
    result = []
    for stage in STAGES:
        if not stage.wanted(recipe):
            continue
        if not stage.per_target:
            result.append(Step(stage))
            continue
        here = [profile for profile in profiles if not stage.on_device or profile.arch == platform.machine()]
        result += [Step(stage, profile) for profile in here]
    return result
