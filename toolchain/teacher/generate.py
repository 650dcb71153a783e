"""Questions → answers: those of the data set, or those of the teacher by whatever runs it. Writes answers.jsonl.

Nothing is filtered here: `select` does that, so that another filter asks nothing anew. `resume/answers.jsonl` has what
was answered before a kill; a further run asks only what is missing there.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data.answers import SETS, Answered, Candidate, SetName, write_answers
from toolchain.data.formats import Example, check_disjoint, read_examples
from toolchain.data.rows import Message
from toolchain.errors import DataError, ModelError
from toolchain.recipe import Data, Endpoint, Generate
from toolchain.reporter import Reporter
from toolchain.student import checkpoint_files, load
from toolchain.teacher.journal import Journal, Prompt

if TYPE_CHECKING:
    from toolchain.gguf.llama_cpp import LlamaCpp

OUTPUT = "answers.jsonl"
Encode = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class _Question:
    set: SetName
    example: Example


def run(
    settings: Generate,
    data: Data,
    *,
    seed: int,
    teacher: Path | None,
    gguf: Path | None,
    endpoint: Endpoint | None,
    load_in_4bit: bool,
    llama: "LlamaCpp | None",
    train: Path,
    held_out: Path,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Answer every question of both files, in their order.

    An `endpoint` answers where there is one; else llama.cpp (`llama`) runs `gguf`, with the tokenizer in `teacher`;
    else Transformers runs the checkpoint folder `teacher`. Raises DataError, ModelError, EndpointError, HostError.
    """
    from_data = settings.answers == "dataset"
    files: dict[SetName, Path] = {"train": train, "held_out": held_out}
    examples = {
        name: read_examples(files[name], format=data.format, need_answer=from_data, system=data.system) for name in SETS
    }
    check_disjoint(examples["train"], examples["held_out"])
    questions = [_Question(name, example) for name in SETS for example in examples[name]]
    started = time.perf_counter()
    if from_data:
        answered = [_answered(question, None, [Candidate(_answer(question), None, "stop")]) for question in questions]
        facts: dict[str, Any] = {"engine": "data set"}
    else:
        answered, facts = _ask(
            settings,
            questions,
            seed=seed,
            teacher=teacher,
            gguf=gguf,
            endpoint=endpoint,
            load_in_4bit=load_in_4bit,
            llama=llama,
            out=out,
            report=report,
        )
    write_answers(out / OUTPUT, answered)
    candidates = [candidate for entry in answered for candidate in entry.candidates]
    cut = sum(candidate.finish == "length" for candidate in candidates)
    return {
        "summary": f"{len(candidates)} answers to {len(questions)} questions by {facts['engine']}, {cut} cut off",
        "answers": settings.answers,
        "questions": {name: len(examples[name]) for name in SETS},
        "candidates": len(candidates),
        "cut_off": cut,
        "empty": sum(not candidate.text.strip() for candidate in candidates),
        "seconds": time.perf_counter() - started,
        **facts,
    }


def render_text(tokenizer: Any, messages: Sequence[Message], *, where: str, answer: str | None = None) -> str:
    """A conversation as the chat template writes it: up to the answer, or with it. Raises ModelError."""
    if not tokenizer.chat_template:
        raise ModelError(f"{tokenizer.name_or_path}: no chat template", hint="put its chat_template.jinja there")
    turns = [message.as_dict() for message in messages]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    import jinja2  # what templates raise; loaded by transformers anyway

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
    except jinja2.TemplateError as error:
        raise ModelError(f"{where}: the chat template refuses it: {error}") from error


def render(tokenizer: Any, messages: Sequence[Message], *, where: str, answer: str | None = None) -> tuple[int, ...]:
    """Token ids of a conversation as the chat template writes it: up to the answer, or with it. Raises ModelError."""
    # The template writes bos itself where the model has one.
    return _encoder(tokenizer)(render_text(tokenizer, messages, where=where, answer=answer))


def _encoder(tokenizer: Any) -> Encode:
    return lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer(question: _Question) -> str:
    assert question.example.answer is not None
    return question.example.answer


def _answered(question: _Question, ids: tuple[int, ...] | None, candidates: Sequence[Candidate]) -> Answered:
    example = question.example
    return Answered(example.id, question.set, example.messages, example.answer, ids, tuple(candidates))


# --- Asking the teacher.


def _ask(
    settings: Generate,
    questions: Sequence[_Question],
    *,
    seed: int,
    teacher: Path | None,
    gguf: Path | None,
    endpoint: Endpoint | None,
    load_in_4bit: bool,
    llama: "LlamaCpp | None",
    out: Path,
    report: Reporter,
) -> tuple[list[Answered], dict[str, Any]]:
    if endpoint is not None:
        from toolchain.teacher import endpoint as client

        prompts = _prompts(settings, questions, seed=seed, teacher=None, encode=None)
        with Journal(out / "resume" / OUTPUT) as journal:
            facts = client.answer(settings, prompts, endpoint=endpoint, journal=journal, report=report)
    elif gguf is not None:
        from toolchain.gguf.score import open_vocabulary
        from toolchain.teacher import gguf_decode

        assert teacher is not None
        assert llama is not None
        with open_vocabulary(gguf, llama=llama) as vocabulary:
            encode: Encode = lambda text: tuple(vocabulary.encode(text, add_special=False))  # noqa: E731
            prompts = _prompts(settings, questions, seed=seed, teacher=teacher, encode=encode)
        with Journal(out / "resume" / OUTPUT) as journal:
            facts = gguf_decode.answer(
                settings, prompts, gguf=gguf, tokenizer=teacher, llama=llama, journal=journal, report=report
            )
    else:
        from toolchain.teacher import decode

        assert teacher is not None
        prompts = _prompts(settings, questions, seed=seed, teacher=teacher, encode=None)
        with Journal(out / "resume" / OUTPUT) as journal:
            facts = decode.answer(
                settings, prompts, teacher=teacher, load_in_4bit=load_in_4bit, journal=journal, report=report
            )
    each = settings.candidates
    answered = []
    for at, question in enumerate(questions):
        asked = prompts[at * each : (at + 1) * each]
        found = [journal.answers[prompt.number] for prompt in asked]
        answered.append(_answered(question, asked[0].ids or None, found))
    return answered, facts


def _prompts(
    settings: Generate, questions: Sequence[_Question], *, seed: int, teacher: Path | None, encode: Encode | None
) -> list[Prompt]:
    """A prompt per question and candidate, in order. `encode` None: by the teacher's tokenizer; without a `teacher`
    prompts have no ids. Raises DataError for a question that fills the teacher's context."""
    tokenizer = positions = None
    if teacher is not None:
        tokenizer = load.load_tokenizer(teacher)
        encode = encode or _encoder(tokenizer)
        positions = checkpoint_files.read_config(teacher).get("max_position_embeddings")
    prompts: list[Prompt] = []
    for question in questions:
        example = question.example
        ids: tuple[int, ...] = ()
        limit = settings.max_new_tokens
        if encode is not None:
            ids = encode(render_text(tokenizer, example.messages, where=example.where))
            if isinstance(positions, int):
                limit = min(limit, positions - len(ids))
            if limit < 1:
                raise DataError(
                    f"{example.where}: the question has {len(ids)} tokens, the teacher was made for {positions}",
                    hint="shorten the row, or leave it out",
                )
        for candidate in range(settings.candidates):
            name = f"{seed}/{question.set}/{example.id}/{candidate}"
            digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
            own_seed = int.from_bytes(digest[:8], "little") >> 1
            prompts.append(Prompt(len(prompts), example.where, example.messages, ids, limit, own_seed))
    return prompts
