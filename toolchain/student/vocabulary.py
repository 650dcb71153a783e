"""Do teacher and student speak the same tokens? Reads two checkpoint folders, without weights; writes vocabulary.json.

What is compared: the id maps, special and added tokens among them; how both split text, which the merges, the
normalizer and the pre-tokenizer decide: PROBES, the text of every token, and random fours of these texts; and the rows
of both models. What a tokenizer puts around a text does not count, for rows are rendered without it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolchain.errors import ArtifactError, ModelError
from toolchain.student import checkpoint_files, load

Verdict = Literal["same", "padded", "different", "unknown"]
Method = Literal["logits", "answers", "uld"]
OUTPUT = "vocabulary.json"

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x[0] + 3.14159 # 12345678\n\n\n",
    "Größe, naïve café, ΑΒΓ, Привет, 你好世界, こんにちは, مرحبا, नमस्ते",
    "🙂👩‍👩‍👧 ﬁ ½ Å é \u00a0x\u200by",
    "ls -la /usr/local/bin | grep -E '^d' > out.txt && echo \"don't, won't, I'LL\"",
    "https://example.org/a?b=c&d=%20e  1,000,000.00 1e-05 0x7fFF",
)
"""Texts on which tokenizers with equal id maps still differ: spaces, digits, case, scripts, Unicode form. None has a
special token of a known model in it, so that padded tokenizers encode them alike."""
_CONVERSATION = [
    {"role": "user", "content": "What does ls do?"},
    {"role": "assistant", "content": "It lists files."},
    {"role": "user", "content": " And  cp 123?\n"},
]
_JOINED = 4
_LEAST = 2000
"""Least number of joined texts."""


@dataclass(frozen=True)
class Side:
    """One of the two."""

    tokens: int
    rows: int
    """Rows of the embedding, by config.json."""


@dataclass(frozen=True)
class Comparison:
    """What was found, and why. Digests are SHA-256."""

    verdict: Verdict
    """"same": equal id maps, splits and rows. "padded": below `ids` everything is equal, and beyond there are only rows
    or added tokens of one side. "different": anything else. "unknown": there is no local teacher."""
    reasons: tuple[str, ...]
    ids: int
    """How many ids, from 0, mean the same on both sides: the width of a loss over both. 0 when different or unknown."""
    teacher_template: str | None
    """Digest of the chat template, None without one; the verdict does not depend on templates."""
    student_template: str | None
    tokenizer: str | None
    """tokenizer_digest over `ids`; None when different or unknown."""
    prompts: str | None
    """Why a conversation does not become the same row on both sides; None when it does, or cannot be told."""
    teacher: Side | None
    student: Side

    @property
    def common(self) -> bool:
        """Whether a loss over both sides' logits is defined."""
        return self.verdict in ("same", "padded")

    @property
    def same_rows(self) -> bool:
        """Whether a row is also to the teacher what it is to the student: KL between the two means something."""
        return self.common and self.prompts is None


def run(*, method: Method, on_policy: bool, teacher: Path | None, student: Path, out: Path) -> dict[str, Any]:
    """Write out/vocabulary.json. `teacher` None: it answers from an endpoint alone.

    Raises ModelError where `method` or `on_policy` needs common ids and the two have none, before anything is computed.
    """
    if method == "logits":
        found = require_common(teacher, student)
    elif on_policy:
        found = require_common(teacher, student, remedy="set on_policy.steps = 0")
    else:
        found = verdict(teacher, student)
    (out / OUTPUT).write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    summary = {
        "same": f"one tokenizer, {found.ids} ids",
        "padded": f"one tokenizer, padded: {found.ids} common ids",
        "different": "two tokenizers",
        "unknown": "the teacher's tokenizer is not known: it answers from an endpoint",
    }[found.verdict]
    if found.common and method == "uld":
        summary += "; distill.method = 'logits' would be exact here, 'uld' is not"
    return {"summary": summary, "verdict": found.verdict, "reasons": list(found.reasons), "ids": found.ids}


def read(path: Path) -> Comparison:
    """A comparison that `run` wrote. Raises ArtifactError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        sides = {name: None if raw[name] is None else Side(**raw[name]) for name in ("teacher", "student")}
        return Comparison(**{**raw, **sides, "reasons": tuple(raw["reasons"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: not a comparison of tokenizers: {error}", hint="run the `vocabulary` stage again"
        ) from error


def verdict(teacher: Path | None, student: Path) -> Comparison:
    """Compare the tokenizers and rows of two checkpoint folders.

    Raises ModelError for a tokenizer or a template that cannot be used, and for a model with fewer rows than tokens.
    """
    own = _Tokens.of(student)
    if teacher is None:
        return Comparison("unknown", (), 0, None, own.template, None, None, None, own.side)
    other = _Tokens.of(teacher)
    common = min(other.end, own.end)
    reasons = [*_unlike_ids(other, own, common)] or [*_unlike_splits(other, own, common)]
    sides: dict[str, Any] = {
        "teacher_template": other.template, "student_template": own.template, "teacher": other.side, "student": own.side
    }  # fmt: skip
    if reasons:
        return Comparison("different", tuple(reasons), 0, tokenizer=None, prompts=None, **sides)
    if other.side == own.side:
        kind: Verdict = "same"
        common = own.side.rows
    else:
        kind = "padded"
        reasons = [
            f"ids 0 to {common - 1} agree; teacher: {other.side.tokens} tokens in {other.side.rows} rows, "
            f"student: {own.side.tokens} in {own.side.rows}"
        ]
    digest = tokenizer_digest(own.tokenizer, ids=common)
    prompts = _unlike_prompts(other, own, common, load.stop_ids(teacher, other.tokenizer))
    return Comparison(kind, tuple(reasons), common, tokenizer=digest, prompts=prompts, **sides)


def require_common(
    teacher: Path | None, student: Path, *, remedy: str = "set distill.method = 'answers' or 'uld'"
) -> Comparison:
    """The comparison, where a loss over logits is defined and a conversation gives both the same row.

    Raises ModelError otherwise, with `remedy` in its hint.
    """
    found = verdict(teacher, student)
    if not found.common:
        sizes = [f"{side.tokens} tokens" if side else "unknown" for side in (found.teacher, found.student)]
        raise ModelError(
            f"teacher {teacher or 'behind an endpoint'} ({sizes[0]}) and student {student} ({sizes[1]}) have "
            f"{found.verdict if teacher is None else 'different'} tokenizers: "
            f"{'; '.join(found.reasons) or 'there is no teacher.model'}",
            hint=f"a loss over logits is undefined between them: {remedy}, or choose a student of the teacher's family",
        )
    if found.prompts is not None:
        raise ModelError(
            f"teacher {teacher} and student {student} share their tokens, and not their prompts: {found.prompts}",
            hint="the student learns, and the device writes, with the student's: copy the teacher's chat template and "
            f"special tokens (chat_template.jinja, tokenizer_config.json) into the student's folder; or {remedy}",
        )
    return found


@dataclass(frozen=True)
class _Tokens:
    """The tokenizer of one folder, looked at once."""

    tokenizer: Any
    by_id: Mapping[int, str]
    added: Mapping[int, str]
    side: Side
    template: str | None
    rendered: str | None
    """_CONVERSATION by the chat template."""

    @classmethod
    def of(cls, folder: Path) -> "_Tokens":
        tokenizer = load.load_tokenizer(folder)
        by_id = {number: token for token, number in tokenizer.get_vocab().items()}
        if not by_id:
            raise ModelError(f"{folder}: the tokenizer has no tokens", hint="is tokenizer.json whole?")
        added = {number: token for token, number in tokenizer.get_added_vocab().items()}
        rows = _rows(folder, tokens=max(by_id) + 1)
        if rows <= max(by_id):
            raise ModelError(
                f"{folder}: {rows} rows by config.json, but the tokenizer has ids up to {max(by_id)}",
                hint="model and tokenizer are not of one release",
            )
        template = template_digest(tokenizer)
        rendered = load.render(tokenizer, _CONVERSATION) if tokenizer.chat_template else None
        return cls(tokenizer, by_id, added, Side(len(by_id), rows), template, rendered)

    @property
    def end(self) -> int:
        """The first id after all tokens."""
        return max(self.by_id) + 1


def _rows(folder: Path, *, tokens: int) -> int:
    if not (folder / "config.json").exists():
        return tokens  # unpacked from a GGUF, whose tokenizer names every row
    config = checkpoint_files.read_config(folder)
    rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if not isinstance(rows, int):
        raise ModelError(f"{folder}/config.json: no vocab_size")
    return rows


def _unlike_ids(teacher: _Tokens, student: _Tokens, common: int) -> Iterable[str]:
    unlike = [number for number in range(common) if teacher.by_id.get(number) != student.by_id.get(number)]
    if unlike:
        shown = ", ".join(
            f"{number}: {teacher.by_id.get(number)!r} for the teacher, {student.by_id.get(number)!r} for the student"
            for number in unlike[:2]
        )
        kind = (
            "; all of these are added tokens" if all(n in teacher.added or n in student.added for n in unlike) else ""
        )
        yield f"{len(unlike)} of {common} ids differ, such as {shown}{kind}"


def _unlike_splits(teacher: _Tokens, student: _Tokens, common: int) -> Iterable[str]:
    """The first text that is split in another way, though the ids agree."""
    if (settings := _serialized(teacher.tokenizer)) is not None and settings == _serialized(student.tokenizer):
        return
    beyond = {token for side in (teacher, student) for number, token in side.added.items() if number >= common}
    larger = max(teacher, student, key=lambda side: side.end)
    texts = [text for text in _texts(larger) if not any(token in text for token in beyond)]
    splits = [_encode_all(side.tokenizer, texts) for side in (teacher, student)]
    unlike = [at for at, (one, other) in enumerate(zip(*splits, strict=True)) if one != other]
    if unlike:
        text, (one, other) = texts[unlike[0]], (split[unlike[0]] for split in splits)
        yield (
            f"{len(unlike)} of {len(texts)} texts are split in another way, such as {text[:40]!r}: "
            f"{_tokens_of(teacher, one)} for the teacher, {_tokens_of(student, other)} for the student"
        )


def _texts(side: _Tokens) -> list[str]:
    """PROBES, added tokens between words, the text of every token, and random fours of these, joined."""
    numbers = sorted(side.by_id)
    backend = getattr(side.tokenizer, "backend_tokenizer", None)
    if backend is None:
        single = [side.tokenizer.decode([number]) for number in numbers]
    else:
        single = backend.decode_batch([[number] for number in numbers], skip_special_tokens=False)
    drawn = np.random.default_rng(0).integers(len(single), size=(max(_LEAST, len(single) // _JOINED), _JOINED))
    joined = ["".join(single[at] for at in four) for four in drawn.tolist()]
    return [*PROBES, *(f"a {token} b{token}c" for token in side.added.values()), *single, *joined]


def _serialized(tokenizer: Any) -> str | None:
    """Everything that decides a split, where the tokenizers library does it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # A tokenizer.json can come with both switched on.
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def _encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [encode(tokenizer, text) for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _tokens_of(side: _Tokens, ids: Sequence[int]) -> str:
    shown = " ".join(repr(side.by_id.get(number)) for number in ids[:6])
    return f"[{shown}{' …' if len(ids) > 6 else ''}]"


def _unlike_prompts(teacher: _Tokens, student: _Tokens, common: int, teacher_stops: Sequence[int]) -> str | None:
    """Why _CONVERSATION, answered, is not one row for both; None when it is."""
    if teacher.template != student.template:
        return f"chat templates differ: the teacher {_short(teacher.template)}, the student {_short(student.template)}"
    if teacher.rendered != student.rendered:
        texts = f"{teacher.rendered!r} for the teacher and {student.rendered!r} for the student"
        return f"the same chat template gives {texts}"
    if student.rendered is not None:
        for side, name in ((teacher, "teacher"), (student, "student")):
            last = max(encode(side.tokenizer, student.rendered))
            if last >= common:
                return f"a prompt has a token that only the {name} knows: {side.by_id[last]!r} (id {last})"
    eos = student.tokenizer.eos_token_id
    if eos is not None and eos not in teacher_stops:
        ends = ", ".join(repr(teacher.by_id.get(number)) for number in teacher_stops)
        return f"the student's answers end with {student.by_id.get(eos)!r} (id {eos}), the teacher's with {ends}"
    return None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without what a tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def template_digest(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template's text; None without one."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_digest(tokenizer: Any, *, ids: int) -> str:
    """SHA-256 of what the tokens below `ids` are and how PROBES are encoded: equal wherever the verdict is "same" or
    "padded", however the tokenizer's files are written."""
    tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number < ids)
    encodings = [encode(tokenizer, probe) for probe in PROBES]
    return hashlib.sha256(json.dumps([tokens, encodings]).encode()).hexdigest()


def _short(digest: str | None) -> str:
    return "has none" if digest is None else f"has sha256:{digest[:12]}"
