"""Recipe: what to train and what to build, as frozen models. A default lives here and nowhere else."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from toolchain.settings import OPERATIONAL, ExistingPath, Settings, read_toml

DataFormat = Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "question-answer"]
FileType = Literal["Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
TensorType = Literal[
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"
]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
HubName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class SpecialTokens(Settings):
    """Special tokens to set on the tokenizer, where the source has them wrong or not at all."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None


class Endpoint(Settings):
    """An OpenAI-compatible server that answers for the teacher: vLLM, llama-server, a hosted one."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+")]
    """Up to and with the version, such as http://localhost:8000/v1."""
    model: Annotated[str, StringConstraints(min_length=1)]
    """Name that the server knows the teacher by."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable with the key, which itself stands in no file; unset where the server asks for none."""
    concurrency: Annotated[int, Field(ge=1, le=1024), OPERATIONAL] = 8
    """Most requests at a time."""
    requests_per_minute: Annotated[int | None, Field(ge=1), OPERATIONAL] = None
    tokens_per_minute: Annotated[int | None, Field(ge=1), OPERATIONAL] = None
    timeout_s: Annotated[float, Field(gt=0), OPERATIONAL] = 120.0
    """Longest wait for one answer, in seconds."""
    retries: Annotated[int, Field(ge=0, le=100), OPERATIONAL] = 6
    """Further tries of a request that failed in a way that passes: 408, 409, 429, 5xx, a broken connection."""
    input_price: Annotated[float | None, Field(ge=0), OPERATIONAL] = None
    """Price of a million prompt tokens, in whatever currency; with `output_price` the manifest states the cost."""
    output_price: Annotated[float | None, Field(ge=0), OPERATIONAL] = None
    max_cost: Annotated[float | None, Field(gt=0), OPERATIONAL] = None
    """No further question is asked once the answers so far cost this much; what was paid for is kept."""

    @model_validator(mode="after")
    def _has_no_secret(self) -> Self:
        if any(sign in self.url for sign in "@?#"):
            raise ValueError("url has a user, a query or a fragment: a key belongs into the variable of key_variable")
        return self

    @model_validator(mode="after")
    def _has_prices(self) -> Self:
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_cost needs input_price and output_price")
        return self


class Teacher(Settings):
    """The model that provides answers and logits."""

    model: ExistingPath | None = None
    """A Hugging Face checkpoint folder (safetensors), or one .gguf file. Left out: `endpoint` alone, without logits."""
    sha256: Sha256 | None = None
    """Digest that a .gguf file must have."""
    special_tokens: SpecialTokens = SpecialTokens()
    engine: Literal["auto", "transformers", "llama.cpp"] = "auto"
    """What runs it. "auto": Transformers; a .gguf file is unpacked once into a checkpoint for it. "llama.cpp" runs a
    .gguf file as it is."""
    load_in_4bit: bool = False
    """Weights in 4 bits (bitsandbytes NF4) while it answers and is captured; needs an NVIDIA GPU."""
    endpoint: Endpoint | None = None

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if self.model is None and self.endpoint is None:
            raise ValueError("model is missing, and there is no endpoint either")
        if self.engine == "llama.cpp" and (self.model is None or self.model.suffix != ".gguf"):
            raise ValueError("engine 'llama.cpp' needs a .gguf file as model")
        if self.engine == "llama.cpp" and self.load_in_4bit:
            raise ValueError("load_in_4bit is for Transformers; a .gguf file has its own quantization")
        return self


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
    candidates: int = Field(1, ge=1, le=64)
    """Answers per question; `select` takes the best. More than one needs a sampling_temperature above 0."""
    batch_size: int = Field(32, ge=1, le=4096)
    sampling_temperature: float = Field(0.0, ge=0, le=5)
    """0 is greedy decoding."""
    sampling_top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1, le=2)

    @model_validator(mode="after")
    def _candidates_differ(self) -> Self:
        if self.candidates > 1 and self.sampling_temperature == 0:
            raise ValueError("candidates above 1 needs a sampling_temperature above 0: greedy answers are all the same")
        if self.candidates > 1 and self.answers == "dataset":
            raise ValueError("candidates above 1 needs answers = 'teacher': a data set has one answer per question")
        return self


class Select(Settings):
    """Which answers become rows. Another choice asks the teacher nothing anew."""

    truncated: Literal["drop", "keep"] = "drop"
    """Answers that reach generate.max_new_tokens without eos: left out and counted, or kept (without an eos to learn
    from)."""
    min_answer_tokens: int = Field(1, ge=1)
    max_answer_tokens: int | None = Field(None, ge=1)
    """Length window, without eos: answers outside it are left out and counted."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Training rows with a question or an answer that came before (case, spaces and punctuation aside): kept, or left
    out and counted."""
    embedding_model: ExistingPath | None = None
    """Folder of a sentence-transformers model. Of several candidates the one most alike is taken: to the data set's
    answer where it has one, else to the other candidates."""

    @model_validator(mode="after")
    def _has_a_window(self) -> Self:
        if self.max_answer_tokens is not None and self.max_answer_tokens < self.min_answer_tokens:
            raise ValueError("max_answer_tokens is below min_answer_tokens: no answer is left")
        return self


class Capture(Settings):
    """What is stored of the teacher's distribution at every answer token."""

    selection: Literal["top", "sample"] = "top"
    """"top": the likeliest ids, and the exact mass of all others. "sample": `samples` draws from the distribution at
    distill.temperature, whose loss is right on average (Sparse Logit Sampling); for "forward_kl" alone."""
    top_k: int = Field(256, ge=1, le=4096)
    """Most ids kept per position."""
    top_p: float = Field(0.999, gt=0, le=1)
    """A position keeps ids only until they hold this share of the probability, and only ids with at least
    `min_probability`; both at the highest temperature of `temperatures`. The likeliest id is always kept."""
    min_probability: float = Field(0.002, ge=0, lt=1)
    """0 leaves the choice to top_k and top_p."""
    value_bits: int = Field(7, ge=1, le=12)
    """Bits that the root of a kept probability is rounded to."""
    samples: int = Field(50, ge=1, le=4096)
    temperatures: tuple[PositiveFloat, ...] | None = None
    """Temperatures for which the tail mass is stored. Left out: distill.temperature alone."""
    batch_tokens: int = Field(2048, ge=16)
    """Tokens per forward pass, padding included."""

    @model_validator(mode="after")
    def _a_sample_has_one_temperature(self) -> Self:
        if self.selection == "sample" and len(self.temperatures or (1.0,)) > 1:
            raise ValueError("selection 'sample' draws at one temperature: leave temperatures out")
        return self


class Distill(Settings):
    """LoRA training of the student: ce_weight · CE + kl_weight · T² · D(teacher, student), answer tokens only."""

    method: Literal["logits", "answers", "uld"] = "logits"
    """"logits": captured teacher logits, where teacher and student have token ids in common. "answers": the teacher's
    answers alone (CE). "uld": an optimal-transport loss between different tokenizers, with the teacher in memory."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"] = "forward_kl"
    """D. forward_kl: KL(teacher ‖ student); reverse_kl: KL(student ‖ teacher); jsd: generalised Jensen-Shannon with
    `jsd_beta`; skew_kl, skew_reverse_kl: DistiLLM's, with `skew`; tvd: total variation distance."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """Share of the teacher in the mixture of "jsd"."""
    skew: float = Field(0.1, gt=0, lt=1)
    """Share that the other side is mixed with in "skew_kl" and "skew_reverse_kl"."""
    temperature: Annotated[float, Field(ge=0.1, le=100)] = 2.0
    ce_weight: float = Field(0.5, ge=0)
    kl_weight: float = Field(0.5, ge=0)
    """Weight of D."""
    engine: Literal["auto", "unsloth", "transformers"] = "auto"
    """"auto": Unsloth on an NVIDIA GPU that it supports, else Transformers + PEFT. The manifest says which it was."""
    load_in_4bit: bool = False
    """QLoRA: the base in 4 bits (NF4) while the adapter is trained; needs an NVIDIA GPU. Small students keep more
    quality in 16 bits."""
    optimizer: Literal["auto", "adamw", "adamw_8bit"] = "auto"
    """"auto": 8-bit AdamW (bitsandbytes) on an NVIDIA GPU, else AdamW."""
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
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, more time. Left out: with Unsloth (its own kind), and
    not otherwise."""
    log_every_steps: int = Field(10, ge=1)
    checkpoint_every_steps: int = Field(50, ge=1)
    """A killed run goes on from the newest checkpoint."""

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.ce_weight == 0 and (self.kl_weight == 0 or self.method == "answers"):
            raise ValueError("ce_weight is 0 and there is no other loss: nothing to learn from")
        return self

    @property
    def uses_logits(self) -> bool:
        """Whether captured logits are needed."""
        return self.method == "logits" and self.kl_weight > 0


class OnPolicy(Settings):
    """A further phase after `distill`, where the student answers and the teacher scores (TRL's GKD). Off at 0 steps.
    Precision, warm-up, clipping, optimizer and 4 bits are those of `distill`."""

    steps: int = Field(0, ge=0)
    batch_size: int = Field(8, ge=1)
    """Rows per step."""
    learning_rate: PositiveFloat = 5e-5
    student_share: Share = 1.0
    """Share of the batches with the student's own answers; the others have the teacher's."""
    jsd_beta: Share = 0.5
    """From KL(teacher ‖ student) at 0 over Jensen-Shannon at 0.5 to KL(student ‖ teacher) at 1."""
    sampling_temperature: PositiveFloat = 1.0
    """Of the student's answers; the divergence is taken at 1."""
    max_new_tokens: int = Field(128, ge=1)
    """Most tokens of the student's answers, which end at data.max_length in any case."""
    checkpoint_every_steps: int = Field(50, ge=1)
    """A killed run goes on from the newest checkpoint."""


class Merge(Settings):
    """Base + adapter, folded in fp32."""

    dtype: Literal["auto", "float16", "float32"] = "auto"
    """Stored type. "auto" is float16 where that holds the adapter within `max_kl`, and float32 where it does not.
    bfloat16 is not offered, since it rounds a small adapter away."""
    max_kl: PositiveFloat = 1e-5
    """Gate: mean KL(adapter ‖ merged) on the held-out answers."""


class Card(Settings):
    """What the model says of itself: general.* keys of its GGUF. What is left out is not written, and not guessed."""

    title: str | None = None
    """general.name; left out: the recipe's name."""
    author: str | None = None
    organization: str | None = None
    description: str | None = None
    url: str | None = None
    license: str | None = None
    """SPDX identifier, in small letters as model hubs write it: "apache-2.0"."""
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    """ISO 639-1: "en"."""
    tags: tuple[str, ...] = ()
    base_models: tuple[HubName, ...] = ()
    """What the student was made from, as "organization/name"."""
    datasets: tuple[HubName, ...] = ()
    quantized_by: str | None = None


class Convert(Settings):
    """Merged checkpoint → 16-bit GGUF."""

    max_kl: PositiveFloat = 1e-3
    """Gate: mean KL(merged ‖ 16-bit GGUF), on probe texts at once and on the held-out answers in `evaluate`."""


class Imatrix(Settings):
    """Importance matrix from the training rows, rendered with the chat template."""

    context: int = Field(512, ge=64)
    max_chunks: int | None = Field(100, ge=1)
    """Most contexts of text; left out: all training rows."""
    file: ExistingPath | None = None
    """A matrix of llama-imatrix (GGUF) to take instead, of the same model."""


class Quantize(Settings):
    """16-bit GGUF → quantized GGUF."""

    file_type: FileType = "Q4_K_M"
    allocation: Literal["stock", "error-aware"] = "stock"
    """"stock": llama-quantize decides which tensor gets which type. "error-aware": it is searched for, within the same
    bytes, by what the model loses; the result is taken where it loses less on the held-out answers, beyond doubt."""
    types: tuple[TensorType, ...] = ("Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")
    """What "error-aware" may choose from, as far as the whole is no slower than stock; Q4_0 and Q4_1 are left out."""
    target_bytes: int | None = Field(None, ge=1)
    """Most bytes of all tensors, where "error-aware" is to come out smaller (or larger) than `file_type` would."""
    target_bits: float | None = Field(None, gt=2, le=16)
    """The same in bits per weight, over all tensors."""
    search_tokens: int = Field(4096, ge=64)
    """Answer tokens that "error-aware" tries whole plans on; what single tensors lose is read off a quarter as many
    others, or 512."""
    search_trials: int = Field(30, ge=0)
    """Most whole plans that are tried."""
    plan: ExistingPath | None = None
    """A file of lines `regular expression = type`, such as an earlier run's plan.txt: taken as it is."""

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.target_bytes is not None and self.target_bits is not None:
            raise ValueError("target_bytes and target_bits: give one of them")
        if self.allocation == "stock" and (self.target_bytes is not None or self.target_bits is not None):
            raise ValueError("target_bytes and target_bits need allocation = 'error-aware'")
        if self.plan is not None and self.allocation != "stock":
            raise ValueError("plan: the types are given; leave allocation out")
        return self


class Compare(Settings):
    """Before and after on questions: the student answers, base and merged, and is scored against the teacher."""

    enabled: bool = True
    questions: int | None = Field(None, ge=1)
    """Most questions, of the held-out ones and of `out_of_domain`; left out: all."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Left out: generate.max_new_tokens."""
    batch_size: int = Field(32, ge=1)
    embedding_model: ExistingPath | None = None
    """Folder of a sentence-transformers model for the similarity of answers. Left out: that figure is not given."""
    out_of_domain: ExistingPath | None = None
    """Questions from elsewhere, with answers: there it shows what the student forgets. Left out: not checked."""
    resamples: int = Field(2000, ge=100)
    """Of the paired bootstrap that gives the intervals."""


class Evaluate(Settings):
    """The ledger from teacher to quantized GGUF, on the held-out answers."""

    max_kl_ratio: float = Field(1.0, gt=0)
    """Gate: held-out KL to the teacher after distillation, as a share of what it was before."""
    max_ce_ratio: float = Field(1.0, gt=0)
    """The same gate where teacher and student have different tokenizers, or the teacher is an endpoint: over the
    cross-entropy of the held-out answers."""
    batch_tokens: int = Field(2048, ge=16)


class Base(Settings):
    """What images stand on, by processor: an OCI layout, what `docker save` wrote, or what `toolchain base` makes."""

    x86_64: ExistingPath | None = None
    aarch64: ExistingPath | None = None


class Bundle(Settings):
    """What is shipped, and where to."""

    targets: tuple[Name, ...] = ("x86-cpu",)
    context: int = Field(2048, ge=128)
    """Context the server opens, in tokens."""
    forms: tuple[Literal["archive", "image"], ...] = ()
    """What is made of the bundle beside its folder, one file each: "archive", "image", which needs a base."""
    base: Base | None = None

    @model_validator(mode="after")
    def _each_form_once_and_images_on_a_base(self) -> Self:
        if len(set(self.forms)) < len(self.forms):
            raise ValueError("forms: each one once")
        if "image" in self.forms and self.base is None:
            raise ValueError(
                "forms has 'image', and base is missing: `toolchain base --arch x86_64 --out base.tar` makes one, "
                "then base.x86_64 = 'base.tar'"
            )
        if "image" not in self.forms and self.base is not None:
            raise ValueError("base is for images: add 'image' to forms, or leave it out")
        return self


class Bench(Settings):
    """Figures of the bundle as it is served. A target has a table like it; what a recipe gives comes before it."""

    prompt_tokens: int = Field(512, ge=1)
    generated_tokens: int = Field(128, ge=2)
    repetitions: int = Field(5, ge=1)
    cold_starts: int = Field(5, ge=1)
    """Starts with the page cache warm, and as many with it evicted."""
    depth: int = Field(2048, ge=0)
    """Tokens before the long-context decode, as many as fit the context; 0 leaves it out."""
    clients: tuple[Annotated[int, Field(ge=1, le=64)], ...] = (1, 2, 4)
    """How many ask at the same time; the first is one."""
    sustained_minutes: float = Field(0.0, ge=0, le=600)
    """Answers without a pause, to see whether the device slows down; 0 leaves it out."""
    cool_down_s: float = Field(0.0, ge=0, le=3600)
    """Pause before them: their first minute is not to be one of a device that is hot already."""

    def or_else(self, other: "Bench") -> "Bench":
        """What was given here, and `other` for the rest."""
        return other.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})

    @field_validator("clients")
    @classmethod
    def _one_comes_first(cls, clients: tuple[int, ...]) -> tuple[int, ...]:
        if clients[:1] != (1,):
            raise ValueError("the first number of clients is 1")
        return clients

    @field_validator("sustained_minutes")
    @classmethod
    def _none_or_half_a_minute(cls, minutes: float) -> float:
        if 0 < minutes < 0.5:
            raise ValueError("0, or at least 0.5 minutes")
        return minutes


class Recipe(Settings):
    """One teacher-student pair, from text to device."""

    name: Name
    version: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,31}$")] = "0.1.0"
    seed: int = Field(0, ge=0, lt=2**32)
    teacher: Teacher
    student: Student = Student()
    data: Data
    generate: Generate = Generate()
    select: Select = Select()
    capture: Capture = Capture()
    distill: Distill = Distill()
    on_policy: OnPolicy = OnPolicy()
    merge: Merge = Merge()
    card: Card = Card()
    convert: Convert = Convert()
    imatrix: Imatrix = Imatrix()
    quantize: Quantize = Quantize()
    compare: Compare = Compare()
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
    def _loss_can_read_the_cache(self) -> Self:
        if self.distill.uses_logits and self.capture.selection == "sample" and self.distill.divergence != "forward_kl":
            raise ValueError(
                f"capture.selection 'sample' is right on average for distill.divergence 'forward_kl' alone, not for "
                f"'{self.distill.divergence}': set capture.selection = 'top'"
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

    @model_validator(mode="after")
    def _has_what_the_method_needs(self) -> Self:
        if self.teacher.model is None:
            if self.student.model is None:
                raise ValueError("student.model is missing: an endpoint has no weights to make a student from")
            if self.distill.method != "answers" or self.on_policy.steps:
                raise ValueError(
                    "an endpoint gives answers, no logits: set distill.method = 'answers' and on_policy.steps = 0, "
                    "or give teacher.model as well"
                )
        elif self.teacher.engine == "llama.cpp" and (self.distill.method == "uld" or self.on_policy.steps):
            raise ValueError("distill.method 'uld' and on_policy need the teacher in Transformers: leave engine out")
        if self.teacher.engine == "llama.cpp" and self.student.model is None:
            raise ValueError("student.model is missing: a .gguf file run by llama.cpp gives no weights for a student")
        return self

    @model_validator(mode="after")
    def _can_be_answered_and_chosen(self) -> Self:
        if self.generate.candidates > 1 and self.select.embedding_model is None:
            raise ValueError("generate.candidates above 1 needs select.embedding_model, which tells the best one")
        asks_endpoint = self.teacher.endpoint is not None and self.generate.answers == "teacher"
        if asks_endpoint and self.generate.repetition_penalty != 1:
            raise ValueError("generate.repetition_penalty is not part of the endpoint's interface: leave it out")
        return self

    @property
    def capture_temperatures(self) -> tuple[float, ...]:
        """The temperatures the cache must serve, rising."""
        return tuple(sorted(self.capture.temperatures or (self.distill.temperature,)))


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe. Raises RecipeError."""
    return read_toml(path, Recipe, keys="`toolchain init` writes a recipe with every key", overrides=overrides)
