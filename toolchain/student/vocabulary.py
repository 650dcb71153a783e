"""Do teacher and student speak the same tokens? The verdict comes from id maps and encodings, not from widths."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolchain.errors import ModelError
from toolchain.student import load

Verdict = Literal["same", "padded", "different"]

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x[0] + 3.14159 # 12345678\n\n\n",
    "Größe, naïve café, ΑΒΓ, Привет, 你好世界, こんにちは, مرحبا, नमस्ते",
    "🙂👩‍👩‍👧 ﬁ ½ Å é \u00a0x\u200by",
    "ls -la /usr/local/bin | grep -E '^d' > out.txt && echo \"don't, won't, I'LL\"",
    "https://example.org/a?b=c&d=%20e  1,000,000.00 1e-05 0x7fFF",
    "<|im_start|>user\n<s>[INST]</s><|endoftext|>",
)
"""Texts on which tokenizers with equal id maps still differ: spaces, digits, case, scripts, Unicode form, specials."""


@dataclass(frozen=True)
class Comparison:
    """What was found, and why."""

    verdict: Verdict
    reasons: tuple[str, ...]
    ids: int
    """How many ids, from 0, mean the same on both sides: the width of a loss over both. 0 when different."""
    teacher_template: str | None
    """SHA-256 of the chat template, None without one; the verdict does not depend on it."""
    student_template: str | None


def verdict(teacher: Path, student: Path) -> Comparison:
    """Compare the tokenizers and widths of two checkpoint folders.

    "same": equal id maps, encodings and widths. "padded": the shorter id map is the start of the longer, encodings are
    equal, and only rows or tokens beyond it differ. "different": anything else.
    """
    tokenizers = [load.load_tokenizer(folder) for folder in (teacher, student)]
    widths = [int(load.read_config(folder).get("vocab_size", 0)) for folder in (teacher, student)]
    templates = [template_digest(tokenizer) for tokenizer in tokenizers]
    maps = [{number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    shorter, longer = sorted(maps, key=len)
    reasons: list[str] = []
    unlike = [number for number, token in shorter.items() if longer.get(number) != token]
    if unlike:
        first = min(unlike)
        reasons.append(
            f"{len(unlike)} of {len(shorter)} ids differ, such as {first}: "
            f"{maps[0].get(first)!r} for the teacher, {maps[1].get(first)!r} for the student"
        )
    for probe in PROBES:
        if not unlike and encode(tokenizers[0], probe) != encode(tokenizers[1], probe):
            reasons.append(f"{probe[:30]!r} is split in another way")
    if reasons:
        return Comparison("different", tuple(reasons), 0, *templates)
    if widths[0] == widths[1] and len(shorter) == len(longer):
        return Comparison("same", (), widths[0], *templates)
    common = max(shorter) + 1
    reasons.append(
        f"ids 0 to {common - 1} agree; teacher: {len(maps[0])} tokens in {widths[0]} rows, "
        f"student: {len(maps[1])} in {widths[1]}"
    )
    return Comparison("padded", tuple(reasons), min(common, *widths), *templates)


def require_common(teacher: Path, student: Path) -> Comparison:
    """The comparison, where a loss over logits is defined. Raises ModelError when it is not, or templates differ."""
    found = verdict(teacher, student)
    if found.verdict == "different":
        raise ModelError(
            f"teacher {teacher} and student {student} have different tokenizers: {'; '.join(found.reasons)}",
            hint="choose a student of the teacher's family; KL over logits is undefined between these two",
        )
    if found.teacher_template != found.student_template:
        raise ModelError(
            f"chat templates differ: teacher {teacher} {_short(found.teacher_template)}, "
            f"student {student} {_short(found.student_template)}",
            hint="rows are written with the teacher's and the device would use the student's: "
            "copy the teacher's chat_template.jinja into the student's folder",
        )
    return found


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
    """SHA-256 of what the tokens below `ids` are and how PROBES are encoded: equal wherever the verdict is not
    "different", however the tokenizer's files are written."""
    tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number < ids)
    encodings = [[token for token in encode(tokenizer, probe) if token < ids] for probe in PROBES]
    return hashlib.sha256(json.dumps([tokens, encodings]).encode()).hexdigest()


def _short(digest: str | None) -> str:
    return "has none" if digest is None else f"has sha256:{digest[:12]}"
