"""What a checkpoint says of the texts that its GGUF is compared on: token ids, and log-probabilities by Transformers.

A process of its own says it, while the converter is at work. Both need the same heavy libraries, so it imports them
once and forks: the converter is its child, on the same pages. llama.cpp is in neither, but in the process that asks.
What is said goes through a pipe. With the last of it this process is over, so that llama.cpp has its memory.
"""

import gc
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any

from toolchain import errors, process
from toolchain.data.rows import Row
from toolchain.errors import ExternalToolError, ModelError, ToolchainError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

_COMPARED_TOKENS = 256
"""Most tokens whose logits are compared, unless one text has more. Each costs a pass through the model on both sides,
which takes longer than to convert it; what a conversion gets wrong (a norm, a scale, how a head is turned) is wrong at
every token, and the more so far from the start."""
_PIECE = 64
"""Tokens whose log-probabilities are sent at a time."""
_NOT_NEEDED = ("sklearn", "scipy", "triton")
"""Transformers and torch import them where they are, for what nothing here does: two seconds and 200 MiB."""

PROBES = (
    "Hello, world!",
    "  two spaces before, three after   ",
    "line one\nline two\n\n\nline five\r\n\ttab\t\ttabs",
    " \n \t\n",
    "Größe, naïve, façade, ﬁne — “quoted” … ½ €",
    "日本語のテキスト と 中文字符, русский текст, العربية, हिन्दी",
    "emoji 🚀🚀 👩‍👩‍👧 é (combining) \u200b(zero width)",
    "def f(x: int) -> list[int]:\n    return [x ** 2 for _ in range(10)]  # ok?\n",
    "SELECT * FROM `t` WHERE a != 'b' AND c >= 1e-3; -- x\\y /usr/local/bin",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0xFF",
    "I'm you'll we've THEY'RE don't isn't 'quoted'",
    "<b>not special</b> <|nothing|> [INST] </s> <s>",
)
"""Texts on which tokenizers are known to part ways."""

_CODE = "def f(x):\n    return {k: v for k, v in x.items()}\n"
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "How do I list files?"}],
    [
        {"role": "user", "content": "Hi  there\n"},
        {"role": "assistant", "content": "Hello. 123"},
        {"role": "user", "content": "Größe 🚀?"},
    ],
    [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": f"Explain:\n{_CODE}"}],
    [
        {"role": "system", "content": "日本語で答えてください。"},
        {"role": "user", "content": "एक फ़ाइल 🗑️ कैसे हटाएँ?"},
        {"role": "assistant", "content": f"Like this:\n```python\n{_CODE}```"},
        {"role": "user", "content": "  And <b>now</b>?\t"},
    ],
)
"""Templates that know no system message are spared those with one."""


@dataclass(frozen=True)
class Tokenizer:
    """What the checkpoint's tokenizer says of itself. Ids that it lacks are None."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None
    special_ids: list[int]
    """Of the tokens that are read as one wherever their text stands."""
    ends: list[tuple[int, str]]
    """Id and name of what ends an answer by generation_config.json."""


@dataclass(frozen=True)
class Text:
    """One text, as the checkpoint's tokenizer reads it."""

    text: str
    ids: list[int]
    ids_with_special: list[int]
    """With bos and eos, as the tokenizer adds them."""


def compared(texts: Sequence[Text]) -> Row:
    """What the logits are compared on: the ids of the longest texts, one after another as if they were one.

    A single row needs no padding, and gets far from its start.
    """
    ids: list[int] = []
    for text in sorted(texts, key=lambda text: -len(text.ids)):
        if not ids or len(ids) + len(text.ids) <= _COMPARED_TOKENS:
            ids += text.ids
    return Row("compared", (), "", tuple(ids[:1]), tuple(ids[1:]), "length")


# -- the half that asks ----------------------------------------------------------------------------------------------


class ConvertedBeside:
    """The converter at work, and beside it the checkpoint, which answers in the order of the methods below.

    With `with`; what is not over at its end is ended. Every method raises what the converter or the checkpoint failed
    of: ExternalToolError, HostError for a full disk, ModelError.
    """

    def __init__(self, model: Path, *, log: Path, env: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        """Libraries are loaded from here on. What is put out goes to `log`, and line by line to `on_line`."""
        self._own, self._theirs = Pipe()
        self._group = process.Group()
        self._pool = ThreadPoolExecutor(1)
        self._log = log
        # Layers come and go; without it, what they leave is kept for later: 200 MiB.
        env = {**env, "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
        command = [sys.executable, "-m", __name__, str(self._theirs.fileno()), str(model)]
        self._ended = self._pool.submit(self._run, command, env, on_line)

    def _run(self, command: Sequence[str], env: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        hint = f"full output: {self._log}; llama.cpp is pinned in docker/versions.toml"
        fds = (self._theirs.fileno(),)
        try:
            process.run(command, log=self._log, env=env, on_line=on_line, hint=hint, group=self._group, pass_fds=fds)
        finally:
            # The last end of the pipe but the other process's own: it reads as closed when that one has died.
            self._theirs.close()

    def __enter__(self) -> "ConvertedBeside":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._own.close()
        self._group.stop()
        self._pool.shutdown()

    def start(self, argv: Sequence[str], *, weights: bool = True) -> None:
        """The converter: its script and arguments. Without `weights` the checkpoint's are not read: no log-probs."""
        self._send({"argv": list(argv), "weights": weights})

    def tokenizer(self) -> Tokenizer:
        """Comes while the converter is at work."""
        found = json.loads(self._receive())
        return Tokenizer(**{**found, "ends": [(token_id, name) for token_id, name in found["ends"]]})

    def wait(self) -> None:
        """Until the converter has written its file."""
        self._receive()

    def texts(self, *, without: Iterable[str]) -> list[Text]:
        """What is to be compared, rid of `without` wherever it stands in a text."""
        self._send(list(without))
        return [Text(**text) for text in json.loads(self._receive())]

    def logprobs(self, row: Row) -> "Iterator[npt.NDArray[np.float32]]":
        """Of the row of `compared`, from its first answer token on, in pieces: [tokens of the piece, vocabulary]."""
        import numpy as np

        for start in range(0, len(row.answer_ids), _PIECE):
            tokens = min(_PIECE, len(row.answer_ids) - start)
            yield np.frombuffer(self._receive(), np.float32).reshape(tokens, -1)

    def _send(self, message: object) -> None:
        try:
            self._own.send_bytes(json.dumps(message).encode())
        except BrokenPipeError:
            self._receive()  # what was told before the end, or the end itself

    def _receive(self) -> bytes:
        try:
            found = self._own.recv_bytes()
        except (EOFError, ConnectionResetError):
            self._ended.result()
            raise ExternalToolError("the checkpoint's half ended early", hint=f"full output: {self._log}") from None
        if found.startswith(b'{"error"'):
            told = json.loads(found)
            raise getattr(errors, told["error"])(told["message"], hint=told["hint"])
        return found


# -- the half that answers -------------------------------------------------------------------------------------------


def main() -> int:
    """Arguments: descriptor of the pipe, checkpoint folder."""
    connection, model = Connection(int(sys.argv[1])), Path(sys.argv[2])
    for name in _NOT_NEEDED:
        sys.modules[name] = None  # type: ignore[assignment]  # as Python has it: there is no such module
    import tqdm  # noqa: F401 - before its bars are switched off: the converter's is read

    from toolchain.student import load  # noqa: F401 - before the fork, and the heavy libraries with it

    del os.environ["TQDM_DISABLE"]
    asked = json.loads(connection.recv_bytes())
    gc.freeze()  # a collection writes to every object, and what is written to is no longer shared
    child = os.fork()
    if child == 0:
        process.die_with_parent()
        connection.close()
        _convert(asked["argv"])
        # To take the interpreter apart is to write to all that is shared, and so to copy it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    try:
        _answer(connection, model, child, weights=asked["weights"])
        # Nobody waits for the libraries to clear up, and the memory is wanted.
        os._exit(0)
    except ToolchainError as error:
        told = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        connection.send_bytes(json.dumps(told).encode())
        return 1
    return 0


def _convert(argv: list[str]) -> None:
    """Be the converter, as if started by hand."""
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


def _wait_for(child: int, connection: Connection) -> None:
    """Tell that the converter is done; where it failed, end as it did."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    if code:
        os._exit(code)
    connection.send_bytes(b"converted")


def _answer(connection: Connection, model: Path, converter: int, *, weights: bool) -> None:
    import torch

    from toolchain.student import load

    # The converter keeps one core busy.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    tokenizer = load.load_tokenizer(model)
    connection.send_bytes(json.dumps(asdict(_describe(tokenizer, model))).encode())
    Thread(target=_wait_for, args=(converter, connection), daemon=True).start()
    texts = [_read(tokenizer, text) for text in _texts(tokenizer)]
    row = compared(texts)
    running = load.load_layer_by_layer(model) if weights else None
    states = None if running is None else _states(running, row)
    if without := json.loads(connection.recv_bytes()):
        texts = [_read(tokenizer, _rid_of(without, text.text)) for text in texts]
        # The shorter texts are not in it, and most often only they had such a word.
        if running is not None and compared(texts) != row:
            states = _states(running, compared(texts))
    connection.send_bytes(json.dumps([asdict(text) for text in texts]).encode())
    if states is not None:
        head = load.head_of(running)
        with torch.inference_mode():
            for piece in torch.split(states, _PIECE):
                connection.send_bytes(head(piece).log_softmax(-1).numpy().data)


def _states(model: Any, row: Row) -> "torch.Tensor":
    """[tokens, H]: the hidden states that predict the answer of `row`."""
    import torch

    from toolchain.student import load

    with torch.inference_mode():
        return next(load.answer_states(model, [row]))


def _describe(tokenizer: Any, model: Path) -> Tokenizer:
    path = model / "generation_config.json"
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ends = [] if given is None else given if isinstance(given, list) else [given]
    return Tokenizer(
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        chat_template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        special_ids=sorted(int(token_id) for token_id in tokenizer.added_tokens_decoder),
        ends=[(token_id, str(tokenizer.convert_ids_to_tokens(token_id))) for token_id in ends],
    )


def _read(tokenizer: Any, text: str) -> Text:
    return Text(text, _ids(tokenizer, text), _ids(tokenizer, text, special=True))


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _texts(tokenizer: Any) -> list[str]:
    """Probes, special tokens between words, and rendered chats where there is a template."""
    texts = [*PROBES, *(f"a {token} b{token}" for token in tokenizer.all_special_tokens)]
    return texts + (_chats(tokenizer) if tokenizer.chat_template else [])


def _rid_of(words: Sequence[str], text: str) -> str:
    for word in words:
        text = text.replace(word, "")
    return text


def _chats(tokenizer: Any) -> list[str]:
    """Rendered chats, one of them with the tokenizer's special tokens written by the user."""
    from toolchain.student import load

    asked = [{"role": "user", "content": f"What does {''.join(tokenizer.all_special_tokens)} mean?"}]
    texts = []
    for chat in (*_CHATS, asked):
        try:
            texts.append(load.render(tokenizer, chat))
        except ModelError:
            # A template refuses what it was not written for: a system message, as Gemma's does.
            if chat[0]["role"] != "system":
                raise
    return texts


if __name__ == "__main__":
    sys.exit(main())
