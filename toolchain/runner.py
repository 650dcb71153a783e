"""Whether a stage is reused, resumed or run, and running it. `ls work/` is the state: no database, no index."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolchain.artifact import (
    CHECKPOINT,
    REFERENCE,
    RESUME,
    Artifact,
    Digests,
    Order,
    base_tools,
    clean_partial,
    commit,
    digest_of,
    lock,
    open_artifact,
    partial_of,
)
from toolchain.errors import ArtifactError, GateError, HostError, RecipeError
from toolchain.evaluate.gates import Gate, check_gates, failed_gates
from toolchain.pipeline import (
    BundleStageSettings,
    Made,
    Source,
    Step,
    TokenizerOf,
    gate_limits,
    host_cmake,
    stage_called,
    steps,
    without_paths,
)
from toolchain.recipe import Recipe
from toolchain.reporter import Reporter
from toolchain.settings import Settings, without_operational
from toolchain.worker import run_in_worker

# With generation_config.json, since it can name further tokens that end an answer.
_TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "vocab",
    "merges",
    "spiece",
    "generation_config",
)
State = Literal["reuse", "run", "resume", "wait"]


@dataclass(frozen=True)
class Planned:
    """What would happen to a step, and why."""

    step: Step
    state: State
    why: str
    order: Order | None = None
    inputs: dict[str, Path] | None = None
    final: Path | None = None
    artifact: Artifact | None = None
    settings: Settings | None = None
    """What the stage is given: what the fingerprint is over, and the operational keys."""


class Pipeline:
    """The steps of one recipe over one work folder."""

    def __init__(self, recipe: Recipe, work: Path, *, targets: tuple[str, ...] | None = None) -> None:
        self.recipe: Recipe = without_paths(recipe)
        self._with_paths = recipe
        self.work = work
        self.steps = steps(recipe, targets)
        self._digests = Digests(work / ".digests.json")
        self._done: dict[str, Artifact] = {}

    def plan(self) -> list[Planned]:
        """What would run, what is reused, and why."""
        self._done.clear()
        return [self._plan_step(step) for step in self.steps]

    def run(
        self,
        *,
        report: Reporter,
        on_step: Callable[[Planned, Artifact | None], None],
        only: str | None = None,
        until: str | None = None,
        verify: bool = False,
        command: str = "run",
        launcher: Sequence[str] = (),
    ) -> None:
        """Run what has to be run. `only`: that stage alone, whose inputs must be there; `until`: up to that stage.

        `launcher` starts the stages that several processes can share: torchrun and its options.

        `on_step` is called before a step (artifact None) and after it. Raises what the stages raise, and GateError
        when quality gates keep a bundle from being built.
        """
        asked = only or until
        if asked is not None and all(step.stage.name != asked for step in self.steps):
            hint = "the recipe leaves it out: `toolchain plan` shows the stages that it has"
            raise RecipeError(f"{self.recipe.name}: nothing to do for stage {asked}", hint=hint)
        with lock(self.work, what=command):
            self.check_bases(only=only, until=until)
            self.check_llama_cpp(only=only, until=until)
            self._done.clear()
            for step in self.steps:
                planned = self._plan_step(step, verify=verify)
                if only is not None and step.stage.name != only:
                    continue
                if planned.state == "wait":
                    hint = "run that stage first, or `toolchain run` for all of them"
                    raise ArtifactError(f"{step.name} cannot run yet: {planned.why}", hint=hint)
                if planned.artifact is None:
                    self._refuse_failed_gates(step)
                    on_step(planned, None)
                    planned = self._run_step(planned, report, launcher if step.stage.parallel else ())
                assert planned.artifact is not None
                on_step(planned, planned.artifact)
                if until == step.stage.name and not (step.stage.per_target and step != self._last_of(until)):
                    break

    def _last_of(self, stage: str) -> Step:
        return [step for step in self.steps if step.stage.name == stage][-1]

    def artifacts(self) -> dict[str, Artifact]:
        """The committed artifacts of this recipe, by step name."""
        return {planned.step.name: planned.artifact for planned in self.plan() if planned.artifact is not None}

    def gates(self) -> list[Gate]:
        """The quality gates of the ledger, when there is one."""
        evaluated = self._done.get("evaluate")
        if evaluated is None:
            return []
        ledger = json.loads((evaluated.path / "ledger.json").read_text(encoding="utf-8"))
        return check_gates(ledger, gate_limits(self.recipe))

    def check_llama_cpp(self, *, only: str | None, until: str | None) -> None:
        """A llama.cpp that is not built is found before hours of training, not after. Raises HostError."""
        from toolchain.gguf import llama_cpp

        for step in self.steps:
            if step.stage.uses_llama_cpp(self.recipe) and only in (None, step.stage.name):
                llama_cpp.find(_cmake_of(step))
            if step.stage.name == until:
                return

    def check_bases(self, *, only: str | None, until: str | None) -> None:
        """A base that is missing or will not do is found before hours of training. Raises RecipeError, HostError."""
        from toolchain.bundle import forms, minimal_base

        bundle = self._with_paths.bundle
        if bundle.base is None or only not in (None, "forms") or until not in (None, "forms"):
            return
        for target in (step.target for step in self.steps if step.stage.name == "forms"):
            assert target is not None
            base: Path | None = getattr(bundle.base, target.arch)
            if base is None:
                key = f"bundle.base.{target.arch}"
                raise RecipeError(
                    f"{key} is missing, and the image for {target.name} stands on it",
                    hint=f"{minimal_base.how(target, out=Path('base.tar'))}, then {key} = 'base.tar'",
                )
            forms.check_base(base, target)

    def _refuse_failed_gates(self, step: Step) -> None:
        if step.stage.name != "bundle":
            return
        if failed := failed_gates(self.gates()):
            lines = "; ".join(str(gate) for gate in failed)
            hint = "the ledger shows where quality is lost: `toolchain report`; everything made so far is kept"
            raise GateError(f"no bundle is built: {lines}", hint=hint)

    def _plan_step(self, step: Step, *, verify: bool = False) -> Planned:
        stage = step.stage
        inputs: dict[str, Path] = {}
        digests: dict[str, str] = {}
        for name, source in stage.inputs(self._with_paths).items():
            found = self._find(source, step)
            if found is None:
                assert not isinstance(source, Path)
                return Planned(step, "wait", f"needs {source.stage}, which is not done")
            inputs[name], digests[name] = found
        settings: Settings = without_paths(stage.settings(self.recipe, step.target))
        if stage.uses_llama_cpp(self.recipe):
            from toolchain.gguf import llama_cpp

            try:
                digests["llama_cpp"] = llama_cpp.find(_cmake_of(step)).digest
            except HostError as error:
                return Planned(step, "wait", f"needs llama.cpp: {error.message}; {error.hint}")
        if isinstance(settings, BundleStageSettings):
            settings = settings.model_copy(update={"lineage": self._lineage()})
        asked = without_operational(settings).model_dump(mode="json")
        order = Order(stage.name, stage.version, asked, digests)
        final = self.work / step.folder / order.fingerprint[:16]
        if final.exists():
            artifact = open_artifact(final, expect=order.fingerprint, verify=verify)
            if _refers_elsewhere(artifact, inputs):
                return Planned(step, "run", "the model has moved", order, inputs, final, settings=settings)
            self._done[step.name] = artifact
            return Planned(step, "reuse", "unchanged", order, inputs, final, artifact, settings)
        resume = partial_of(final) / RESUME
        if resume.is_dir() and any(resume.iterdir()):
            return Planned(
                step, "resume", "was interrupted; goes on from what it saved", order, inputs, final, settings=settings
            )
        return Planned(step, "run", self._why(step, order, final), order, inputs, final, settings=settings)

    def _lineage(self) -> dict[str, str]:
        names = (
            "teacher",
            "student",
            "generate",
            "select",
            "distill",
            "on_policy",
            "merge",
            "convert",
            "imatrix",
            "quantize",
            "evaluate",
        )
        lineage = {name: f"sha256:{self._done[name].digest}" for name in names if name in self._done}
        for name in ("train", "held_out"):
            lineage[f"data_{name}"] = f"sha256:{self._done['generate'].manifest.inputs[name]}"
        return lineage

    def _find(self, source: Source, step: Step) -> tuple[Path, str] | None:
        """Path and digest of an input, or None when the stage that makes it is not done."""
        if isinstance(source, Path):
            return source, self._digests.of(source)
        maker = f"{source.stage}[{step.target.name}]" if stage_called(source.stage).per_target and step.target else None
        artifact = self._done.get(maker or source.stage)
        if artifact is None:
            return None
        part = source.part if isinstance(source, Made) else CHECKPOINT
        if part == CHECKPOINT and set(artifact.manifest.files) == {REFERENCE}:
            path = Path(json.loads((artifact.path / REFERENCE).read_text(encoding="utf-8"))["path"])
            if isinstance(source, TokenizerOf):
                files = {file.name: self._digests.of(file) for file in sorted(path.iterdir()) if _is_tokenizer(file)}
                return path, _digest_of(files)
            return path, artifact.digest
        if part == "":
            return artifact.path, artifact.digest
        files = {
            name: record.sha256
            for name, record in artifact.manifest.files.items()
            if name == part or name.startswith(part + "/")
        }
        if isinstance(source, TokenizerOf):
            files = {Path(name).name: digest for name, digest in files.items() if _is_tokenizer(Path(name))}
        if not files:
            raise ArtifactError(f"{artifact.path}: has no {part}", hint="remove it and run the stage again")
        return artifact.path / part, _digest_of(files)

    def _why(self, step: Step, order: Order, final: Path) -> str:
        """Why nothing can be reused: what differs from the newest artifact of this stage."""
        newest = max(_committed(final.parent), key=lambda artifact: artifact.manifest.started, default=None)
        if newest is None:
            return "never made"
        before = newest.manifest
        if before.stage_version != order.version:
            return f"stage version {before.stage_version} → {order.version}"
        changes = [f"{key}: {old} → {new}" for key, old, new in _differences(before.settings, order.settings)]
        changes += [
            f"{name} changed" for name in order.inputs if before.inputs.get(name) != order.inputs[name]
        ]  # fmt: skip
        return "; ".join(changes[:4]) or "made from other settings"

    def _run_step(self, planned: Planned, report: Reporter, launcher: Sequence[str]) -> Planned:
        assert planned.order is not None
        assert planned.final is not None
        assert planned.inputs is not None
        assert planned.settings is not None
        step, order, final = planned.step, planned.order, planned.final
        if step.stage.name == "bundle":
            # What is shipped is read again in full: a bit that flipped on the disk must not leave the house. The model
            # is left to the stage, which reads it anyway.
            for name, left_out in (("quantize", ("model.gguf",)), ("evaluate", ()), ("select", ())):
                open_artifact(self._done[name].path, verify=True, unread=left_out)
        partial, _ = clean_partial(final)
        started_s = time.time()
        job = {
            "stage": step.stage.name,
            "settings": planned.settings.model_dump(mode="json"),
            "inputs": {name: str(path.resolve()) for name, path in planned.inputs.items()},
            "out": str(partial.resolve()),
        }
        log = self.work / "logs" / f"{step.folder}.log"
        metrics = run_in_worker(job, log=log, report=report, launcher=launcher)
        if final.exists():  # a reference to where the model was before
            shutil.rmtree(final)
        known = metrics.pop("digests", {})
        artifact = commit(final, order, metrics=metrics, started_s=started_s, tools=base_tools(), known=known)
        self._done[step.name] = artifact
        return Planned(step, "run", planned.why, order, planned.inputs, final, artifact)


def _refers_elsewhere(artifact: Artifact, inputs: Mapping[str, Path]) -> bool:
    if set(artifact.manifest.files) != {REFERENCE}:
        return False
    path = json.loads((artifact.path / REFERENCE).read_text(encoding="utf-8"))["path"]
    return bool(path != str(inputs["model"].resolve()))


def _cmake_of(step: Step) -> Mapping[str, str | bool]:
    return step.target.runtime.cmake if step.target else host_cmake()


def _is_tokenizer(path: Path) -> bool:
    return path.name.startswith(_TOKENIZER_FILES)


def _digest_of(files: Mapping[str, str]) -> str:
    return next(iter(files.values())) if len(files) == 1 else digest_of(dict(files))


def _committed(folder: Path) -> Iterator[Artifact]:
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and path.suffix != ".partial":
                try:
                    yield open_artifact(path)
                except ArtifactError:
                    continue


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new
