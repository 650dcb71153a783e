"""What trains the student: Unsloth where there is an NVIDIA GPU that it supports, Transformers + PEFT elsewhere.

Unsloth patches Transformers and PEFT when it is imported, and has to be imported before them: `choose` comes first, in
a process that has imported neither.
"""

import atexit
import importlib
import os
import shutil
import tempfile
from typing import Any, Literal

import torch

from toolchain.errors import HostError, RecipeError
from toolchain.recipe import Distill
from toolchain.student import precision

Engine = Literal["unsloth", "transformers"]
_LEAST_CAPABILITY = (8, 0)
"""Ampere: Unsloth runs on older GPUs too, in float16 with a scaled loss, which this trainer does not do."""
_INSTALL = "pip install -c constraints.txt -e '.[train,unsloth]'"


def choose(wanted: Literal["auto", "unsloth", "transformers"]) -> Engine:
    """Settle the engine, and import Unsloth if it is that.

    Raises HostError: "unsloth" where it cannot run, a GPU that torch cannot use, or "auto" on a GPU that Unsloth
    supports when it is not installed, since a quiet fallback would train at half the speed.
    """
    device = precision.pick_device()
    if wanted == "transformers":
        return "transformers"
    why_not = _unsupported(device)
    if why_not is None:
        _import_unsloth()
        return "unsloth"
    if wanted == "unsloth":
        raise HostError(f"distill.engine is 'unsloth', and {why_not}", hint="set distill.engine = 'transformers'")
    return "transformers"


def _unsupported(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "there is no NVIDIA GPU"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; {least} is the least for bfloat16"
    return None


def _import_unsloth() -> None:
    # It compiles code into a folder, ./unsloth_compiled_cache if not told otherwise: each process gets its own.
    folder = tempfile.mkdtemp(prefix="toolchain-unsloth-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["UNSLOTH_COMPILE_LOCATION"] = folder
    hint = f"{_INSTALL}; or set distill.engine = 'transformers', which takes about twice the time"
    try:
        importlib.import_module("unsloth")
    except ModuleNotFoundError as error:
        raise HostError(f"there is an NVIDIA GPU, and the package '{error.name}' is missing", hint=hint) from error
    except (ImportError, RuntimeError, OSError, NotImplementedError) as error:
        raise HostError(f"Unsloth cannot be imported: {error}", hint=hint) from error


def load_for_training(
    settings: Distill, engine: Engine, base: Any, *, max_length: int, seed: int, device: torch.device
) -> Any:
    """The base of folder `base` with a fresh LoRA adapter, in train mode: a PeftModel.

    Raises ModelError, RecipeError for layers that the student does not have, and HostError.
    """
    if engine == "unsloth":
        return _with_unsloth(settings, base, max_length=max_length, seed=seed)
    from peft import LoraConfig, get_peft_model

    from toolchain.student import load

    model, _ = load.load_model(
        base, dtype=precision.weights_type(device), device=device, load_in_4bit=settings.load_in_4bit
    )
    check_targets(model, settings)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=sorted(settings.lora_targets),
        task_type="CAUSAL_LM",
    )
    if checkpoints_activations(settings, engine):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, config).train()


def checkpoints_activations(settings: Distill, engine: Engine) -> bool:
    """Whether activations are computed again in the backward pass."""
    return engine == "unsloth" if settings.gradient_checkpointing is None else settings.gradient_checkpointing


def check_targets(model: Any, settings: Distill) -> None:
    """Raise RecipeError when the student lacks a layer that the adapter is wanted for."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    lost = [wanted for wanted in settings.lora_targets if wanted not in names]
    if lost:
        known = ", ".join(sorted(names))
        raise RecipeError(f"distill.lora_targets: the student has no layer '{lost[0]}'", hint=f"it has: {known}")


def _with_unsloth(settings: Distill, base: Any, *, max_length: int, seed: int) -> Any:
    from unsloth import FastLanguageModel

    checkpointing: str | bool = "unsloth" if checkpoints_activations(settings, "unsloth") else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(base),
        max_seq_length=max_length,
        dtype=torch.bfloat16,
        load_in_4bit=settings.load_in_4bit,
        use_gradient_checkpointing=checkpointing,
        fix_tokenizer=False,  # ours is read from the same folder, and rows are tokens already
        random_state=seed,
        local_files_only=True,
    )
    check_targets(model, settings)
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=sorted(settings.lora_targets),
        bias="none",
        use_gradient_checkpointing=checkpointing,
        max_seq_length=max_length,
        random_state=seed,
    )
    return adapted.train()


def optimizer_name(settings: Distill, device: torch.device) -> str:
    """The Trainer's name of the optimizer. Raises HostError when 8 bits are wanted and bitsandbytes is missing."""
    if settings.optimizer == "adamw" or (settings.optimizer == "auto" and device.type != "cuda"):
        return "adamw_torch"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise HostError(
            "8-bit AdamW needs the package 'bitsandbytes'", hint=f"{_INSTALL}; or set distill.optimizer = 'adamw'"
        )
    return "adamw_8bit"
