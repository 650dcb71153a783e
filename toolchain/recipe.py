"""Recipe: what to train and what to build, as frozen models. A default lives here and nowhere else."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from toolchain.settings import ExistingPath, Settings, read_toml

DataFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "question-answer"]
FileType = Literal["Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class SpecialTokens(Settings):
    """Special tokens to set on the tokenizer, where the source has them wrong or not at all."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None


class Teacher(Settings):
    """The model that provides answers and logits."""

    model: ExistingPath
    """A Hugging Face checkpoint folder (safetensors), or one .gguf file, which is unpacked into such a folder once."""
    sha256: Sha256 | None = None
    """Digest that a .gguf file must have."""
    special_tokens: SpecialTokens = SpecialTokens()


class Student(Settings):
    """The model that learns."""

    model: ExistingPath | None = None
    """A Hugging Face checkpoint folder. Left out: the teacher itself, which `keep_layers` then makes smaller."""
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Decoder layers that stay, counted from 0, in order. Left out: all."""

    @model_validator(mode="after")
    def _layers_rise(self) -> Self:
        if self.keep_layers is not None:
            if not self.keep_layers:
                raise ValueError("keep_layers is empty: at least one layer must stay")
            if list(self.keep_layers) != sorted(set(self.keep_layers)):
                raise ValueError("keep_layers must rise and not repeat")
        return self


class Data(Settings):
    """Questions for training, and held-out questions that no training row may share."""

    train: ExistingPath
    held_out: ExistingPath
    format: DataFormat = "auto"
    """Shape of the rows; "auto" goes by the columns of the first row."""
    system: str | None = None
    """System message put before each question that has none."""
    max_length: int = Field(512, ge=16, le=1_048_576)
    """Most tokens of prompt and answer together."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a row with more than `max_length` tokens. Dropped rows are counted in the manifest."""


class Generate(Settings):
    """Teacher answers."""

    answers: Literal["teacher", "dataset"] = "teacher"
    """Ask the teacher, or take the answers in the data set."""
    max_new_tokens: int = Field(256, ge=1, le=32_768)
    truncated: Literal["drop", "keep"] = "drop"
    """Answers that reach max_new_tokens without eos: left out and counted, or kept (without an eos to learn from)."""
    batch_size: int = Field(32, ge=1, le=4096)
    sampling_temperature: float = Field(0.0, ge=0, le=5)
    """0 is greedy decoding."""
    sampling_top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1, le=2)


class Capture(Settings):
    """The teacher's top-k logits over the answers."""

    top_k: int = Field(64, ge=1, le=4096)
    """Most logits kept per position."""
    top_p: float = Field(0.999, gt=0, le=1)
    """A position keeps logits only until they hold this share of the probability at the highest temperature of
    `temperatures`; the rest is its exact tail mass."""
    temperatures: tuple[PositiveFloat, ...] | None = None
    """Temperatures for which the exact normaliser is stored. Left out: distill.temperature alone."""
    batch_tokens: int = Field(2048, ge=16)
    """Tokens per forward pass, padding included."""


class Distill(Settings):
    """LoRA training of the student: ce_weight · CE + kl_weight · T² · KL(teacher ‖ student), answer tokens only."""

    temperature: PositiveFloat = 2.0
    ce_weight: float = Field(0.5, ge=0)
    kl_weight: float = Field(0.5, ge=0)
    lora_rank: int = Field(16, ge=1, le=1024)
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    learning_rate: PositiveFloat = 2e-4
    warmup_share: Share = 0.05
    """Share of the steps in which the learning rate rises; after it the rate follows a cosine to zero."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    epochs: PositiveFloat = 3.0
    batch_size: int = Field(8, ge=1)
    """Rows per optimiser step and device, gradient accumulation left aside."""
    gradient_accumulation: int = Field(1, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of the forward pass; "auto" is bfloat16 where the processor has instructions for it."""
    gradient_checkpointing: bool = False
    log_every_steps: int = Field(10, ge=1)
    checkpoint_every_steps: int = Field(50, ge=1)
    """A killed run goes on from the newest checkpoint."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.ce_weight == 0 and self.kl_weight == 0:
            raise ValueError("ce_weight and kl_weight are both 0: nothing to learn from")
        return self


class Merge(Settings):
    """Base + adapter, folded in fp32."""

    dtype: Literal["auto", "float16", "float32"] = "auto"
    """Stored type. "auto" is float16 where that holds the adapter within `max_kl`, and float32 where it does not.
    bfloat16 is not offered, since it rounds a small adapter away."""
    max_kl: PositiveFloat = 1e-5
    """Gate: mean KL(adapter ‖ merged) on the held-out answers."""


class Convert(Settings):
    """Merged checkpoint → 16-bit GGUF."""

    max_kl: PositiveFloat = 1e-3
    """Gate: mean KL(merged ‖ 16-bit GGUF) on the held-out answers."""


class Imatrix(Settings):
    """Importance matrix from the training rows, rendered with the chat template."""

    context: int = Field(512, ge=64)
    max_chunks: int | None = Field(100, ge=1)


class Quantize(Settings):
    """16-bit GGUF → quantized GGUF."""

    file_type: FileType = "Q4_K_M"


class Evaluate(Settings):
    """The ledger from teacher to quantized GGUF, on the held-out answers."""

    max_kl_ratio: float = Field(1.0, gt=0)
    """Gate: held-out KL to the teacher after distillation, as a share of what it was before."""
    batch_tokens: int = Field(2048, ge=16)


class Bundle(Settings):
    """What is shipped, and where to."""

    targets: tuple[Name, ...] = ("x86-cpu",)
    context: int = Field(2048, ge=128)
    """Context the server opens, in tokens."""


class Bench(Settings):
    """Figures of the bundle as it is served."""

    prompt_tokens: int = Field(512, ge=1)
    generated_tokens: int = Field(128, ge=2)
    repetitions: int = Field(5, ge=1)
    cold_starts: int = Field(5, ge=1)
    """Starts with the page cache warm, and as many with it evicted."""


class Recipe(Settings):
    """One teacher-student pair, from text to device."""

    name: Name
    version: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,31}$")] = "0.1.0"
    seed: int = Field(0, ge=0, lt=2**32)
    teacher: Teacher
    student: Student = Student()
    data: Data
    generate: Generate = Generate()
    capture: Capture = Capture()
    distill: Distill = Distill()
    merge: Merge = Merge()
    convert: Convert = Convert()
    imatrix: Imatrix = Imatrix()
    quantize: Quantize = Quantize()
    evaluate: Evaluate = Evaluate()
    bundle: Bundle = Bundle()
    bench: Bench = Bench()

    @model_validator(mode="after")
    def _cache_has_the_temperature(self) -> Self:
        kept = self.capture.temperatures
        if kept is not None and self.distill.temperature not in kept:
            raise ValueError(
                f"distill.temperature {self.distill.temperature} is not among capture.temperatures {list(kept)}"
            )
        return self

    @model_validator(mode="after")
    def _bench_fits_the_context(self) -> Self:
        tokens = self.bench.prompt_tokens + self.bench.generated_tokens
        if tokens > self.bundle.context:
            raise ValueError(
                f"bench.prompt_tokens + bench.generated_tokens is {tokens}, bundle.context is {self.bundle.context}"
            )
        return self

    @property
    def capture_temperatures(self) -> tuple[float, ...]:
        """The temperatures the cache must serve, rising."""
        return tuple(sorted(self.capture.temperatures or (self.distill.temperature,)))


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe. Raises RecipeError."""
    return read_toml(path, Recipe, overrides=overrides)
