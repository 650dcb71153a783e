"""The stages in order: what each needs, what of the recipe it can read, and the function that does it.

Heavy libraries are imported inside the adaptors below, which run in a process of their own (toolchain/worker.py).
Whether a stage is reused, resumed or run is decided in toolchain/runner.py.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from toolchain.errors import ArtifactError, HostError, RecipeError
from toolchain.evaluate.gates import GateLimits, check_gates
from toolchain.recipe import (
    Bench,
    Capture,
    Data,
    Distill,
    Generate,
    Imatrix,
    Merge,
    Quantize,
    Recipe,
    Student,
    Teacher,
)
from toolchain.reporter import Reporter
from toolchain.settings import Settings
from toolchain.target import TargetProfile, read_target

Inputs = Mapping[str, Path]
Metrics = dict[str, Any]
CHECKPOINT = "checkpoint"
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
    uses_llama_cpp: bool = False

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


class GenerateSettings(Settings):
    generate: Generate
    data: Data
    seed: int


class CaptureSettings(Settings):
    capture: Capture
    temperatures: tuple[float, ...]


class DistillSettings(Settings):
    distill: Distill
    seed: int


class ConvertSettings(Settings):
    name: str
    cmake: dict[str, str | bool]


class ImatrixSettings(Settings):
    imatrix: Imatrix
    cmake: dict[str, str | bool]


class QuantizeSettings(Settings):
    quantize: Quantize
    cmake: dict[str, str | bool]


class EvaluateSettings(Settings):
    batch_tokens: int
    cmake: dict[str, str | bool]


class BundleStageSettings(Settings):
    name: str
    version: str
    context: int
    target: TargetProfile
    gates: GateLimits
    lineage: dict[str, str] = Field(default_factory=dict)


class SmokeSettings(Settings):
    target: str


class BenchSettings(Settings):
    bench: Bench
    target: str
    host: dict[str, str]


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
    from toolchain.student.load import read_config

    # Said here, before hours of training, and not when the bundle is built.
    positions = read_config(inputs["model"]).get("max_position_embeddings")
    for key, tokens in (("bundle.context", settings.context), ("data.max_length", settings.max_length)):
        if isinstance(positions, int) and tokens > positions:
            raise RecipeError(f"{key} is {tokens}, the student was made for {positions} tokens", hint=f"lower {key}")
    return base.prepare(settings.student, model=inputs["model"], out=out, report=report)


def _generate(settings: GenerateSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.teacher import generate

    return generate.run(
        settings.generate,
        settings.data,
        seed=settings.seed,
        teacher=inputs["teacher"],
        train=inputs["train"],
        held_out=inputs["held_out"],
        out=out,
        report=report,
    )


def _capture(settings: CaptureSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.teacher import capture

    return capture.run(
        settings.capture,
        temperatures=settings.temperatures,
        teacher=inputs["teacher"],
        student=inputs["student"],
        rows=inputs["rows"],
        out=out,
        report=report,
    )


def _distill(settings: DistillSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.student import distill

    return distill.run(
        settings.distill,
        seed=settings.seed,
        base=inputs["base"],
        rows=inputs["rows"],
        logits=inputs.get("logits"),
        out=out,
        report=report,
    )


def _merge(settings: Merge, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.student import merge

    return merge.run(
        settings,
        base=inputs["base"],
        adapter=inputs["adapter"],
        held_out=inputs["held_out"],
        out=out,
        report=report,
    )


def _convert(settings: ConvertSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.gguf import convert, llama_cpp

    llama = llama_cpp.find(settings.cmake)
    return convert.run(model=inputs["model"], name=settings.name, llama=llama, out=out, report=report)


def _imatrix(settings: ImatrixSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.gguf import imatrix, llama_cpp

    return imatrix.run(
        settings.imatrix,
        gguf=inputs["gguf"],
        rows=inputs["rows"],
        tokenizer=inputs["tokenizer"],
        llama=llama_cpp.find(settings.cmake),
        out=out,
        report=report,
    )


def _quantize(settings: QuantizeSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.gguf import llama_cpp, quantize

    llama = llama_cpp.find(settings.cmake)
    return quantize.run(
        settings.quantize, gguf=inputs["gguf"], imatrix=inputs["imatrix"], llama=llama, out=out, report=report
    )


def _evaluate(settings: EvaluateSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.evaluate import ledger
    from toolchain.gguf import llama_cpp

    return ledger.run(
        batch_tokens=settings.batch_tokens,
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
        build.BundleSettings(name=settings.name, version=settings.version, context=settings.context),
        target=settings.target,
        gguf=inputs["gguf"],
        quantize_facts=json.loads(inputs["quantize_facts"].read_text(encoding="utf-8")),
        ledger={**ledger, "gates": gates},
        golden=golden,
        lineage=settings.lineage,
        llama=llama_cpp.find(settings.target.runtime.cmake),
        out=out,
        report=report,
    )


def _smoke(settings: SmokeSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.bundle import onhost

    return onhost.smoke(bundle_of(inputs["bundle"]), out=out, report=report)


def _bench(settings: BenchSettings, inputs: Inputs, out: Path, report: Reporter) -> Metrics:
    from toolchain.bundle import onhost

    return onhost.bench(settings.bench, bundle_of(inputs["bundle"]), out=out, report=report)


GOLDEN_PROMPTS = 8


def bundle_of(artifact: Path) -> Path:
    """The bundle directory inside a `bundle` artifact."""
    found = [path for path in artifact.iterdir() if path.is_dir()]
    if len(found) != 1:
        raise ArtifactError(f"{artifact}: holds {len(found)} bundles, not one", hint="remove it and run `bundle` again")
    return found[0]


def _student_source(recipe: Recipe) -> Source:
    return recipe.student.model if recipe.student.model is not None else Made("teacher", CHECKPOINT)


def _distill_inputs(recipe: Recipe) -> dict[str, Source]:
    inputs: dict[str, Source] = {"base": Made("student", CHECKPOINT), "rows": Made("generate", "train.jsonl")}
    if recipe.distill.kl_weight > 0:
        inputs["logits"] = Made("capture", "")
    return inputs


def gate_limits(recipe: Recipe) -> GateLimits:
    return GateLimits(
        distill_max_kl_ratio=recipe.evaluate.max_kl_ratio,
        merge_max_kl=recipe.merge.max_kl,
        convert_max_kl=recipe.convert.max_kl,
    )


def _target(target: TargetProfile | None) -> TargetProfile:
    assert target is not None
    return target


def _host_facts() -> dict[str, str]:
    from toolchain.device import probe

    return {
        "board": str(probe.board()),
        "cpu": str(probe.cpu_model()),
        "cpus": str(len(probe.usable_cpus())),
        "memory_gib": str(probe.memory_bytes() >> 30),
    }


STAGES: tuple[Stage, ...] = (
    Stage(
        "teacher",
        _teacher,
        Teacher,
        settings=lambda recipe, _: recipe.teacher,
        inputs=lambda recipe: {"model": recipe.teacher.model},
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
        "generate",
        _generate,
        GenerateSettings,
        settings=lambda recipe, _: GenerateSettings(generate=recipe.generate, data=recipe.data, seed=recipe.seed),
        inputs=lambda recipe: {
            "teacher": Made("teacher", CHECKPOINT),
            "train": recipe.data.train,
            "held_out": recipe.data.held_out,
        },
    ),
    Stage(
        "capture",
        _capture,
        CaptureSettings,
        settings=lambda recipe, _: CaptureSettings(capture=recipe.capture, temperatures=recipe.capture_temperatures),
        inputs=lambda recipe: {
            "teacher": Made("teacher", CHECKPOINT),
            "student": TokenizerOf("student"),
            "rows": Made("generate", "train.jsonl"),
        },
    ),
    Stage(
        "distill",
        _distill,
        DistillSettings,
        settings=lambda recipe, _: DistillSettings(distill=recipe.distill, seed=recipe.seed),
        inputs=_distill_inputs,
    ),
    Stage(
        "merge",
        _merge,
        Merge,
        settings=lambda recipe, _: recipe.merge,
        inputs=lambda recipe: {
            "base": Made("student", CHECKPOINT),
            "adapter": Made("distill", "adapter"),
            "held_out": Made("generate", "held_out.jsonl"),
        },
    ),
    Stage(
        "convert",
        _convert,
        ConvertSettings,
        settings=lambda recipe, _: ConvertSettings(name=recipe.name, cmake=host_cmake()),
        inputs=lambda recipe: {"model": Made("merge", CHECKPOINT)},
        uses_llama_cpp=True,
    ),
    Stage(
        "imatrix",
        _imatrix,
        ImatrixSettings,
        settings=lambda recipe, _: ImatrixSettings(imatrix=recipe.imatrix, cmake=host_cmake()),
        inputs=lambda recipe: {
            "gguf": Made("convert", "model-f16.gguf"),
            "rows": Made("generate", "train.jsonl"),
            "tokenizer": TokenizerOf("merge"),
        },
        uses_llama_cpp=True,
    ),
    Stage(
        "quantize",
        _quantize,
        QuantizeSettings,
        settings=lambda recipe, _: QuantizeSettings(quantize=recipe.quantize, cmake=host_cmake()),
        inputs=lambda recipe: {
            "gguf": Made("convert", "model-f16.gguf"),
            "imatrix": Made("imatrix", "imatrix.gguf"),
        },
        uses_llama_cpp=True,
    ),
    Stage(
        "evaluate",
        _evaluate,
        EvaluateSettings,
        settings=lambda recipe, _: EvaluateSettings(batch_tokens=recipe.evaluate.batch_tokens, cmake=host_cmake()),
        inputs=lambda recipe: {
            "held_out": Made("generate", "held_out.jsonl"),
            "teacher": Made("teacher", CHECKPOINT),
            "student": Made("student", CHECKPOINT),
            "adapter": Made("distill", "adapter"),
            "merged": Made("merge", CHECKPOINT),
            "gguf_16bit": Made("convert", "model-f16.gguf"),
            "gguf_quantized": Made("quantize", "model.gguf"),
            "quantize_facts": Made("quantize", "quantize.json"),
        },
        uses_llama_cpp=True,
    ),
    Stage(
        "bundle",
        _bundle,
        BundleStageSettings,
        settings=lambda recipe, target: BundleStageSettings(
            name=recipe.name,
            version=recipe.version,
            context=recipe.bundle.context,
            target=_target(target),
            gates=gate_limits(recipe),
        ),
        inputs=lambda recipe: {
            "gguf": Made("quantize", "model.gguf"),
            "quantize_facts": Made("quantize", "quantize.json"),
            "ledger": Made("evaluate", "ledger.json"),
            "golden": Made("generate", "held_out.jsonl"),
        },
        per_target=True,
        uses_llama_cpp=True,
    ),
    Stage(
        "smoke",
        _smoke,
        SmokeSettings,
        settings=lambda recipe, target: SmokeSettings(target=_target(target).name),
        inputs=lambda recipe: {"bundle": Made("bundle", "")},
        per_target=True,
    ),
    Stage(
        "bench",
        _bench,
        BenchSettings,
        settings=lambda recipe, target: BenchSettings(
            bench=recipe.bench, target=_target(target).name, host=_host_facts()
        ),
        inputs=lambda recipe: {"bundle": Made("bundle", "")},
        per_target=True,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def stage_called(name: str) -> Stage:
    """The stage of that name. Raises RecipeError."""
    for stage in STAGES:
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
    """Every step of a recipe, in order; `targets` narrows those of the recipe."""
    profiles = [read_target(name) for name in (targets or recipe.bundle.targets)]
    result = []
    for stage in STAGES:
        result += [Step(stage, profile) for profile in profiles] if stage.per_target else [Step(stage)]
    return result
