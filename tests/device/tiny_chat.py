"""A one-layer Llama GGUF that chats: whatever is asked, it answers "Hey." and ends; made in a second, for llama.cpp.

Attention and feed-forward weights are zero, so the next token follows from the current one alone: embeddings are unit
vectors, and the output row of a token is the sum of the unit vectors of the tokens it follows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|fin|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
ANSWER = "Hey."
CONTEXT = 1024
_WIDTH = 288
_SPECIAL = ("<|turn|>", "<|fin|>", "<|other|>")


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a GPT-2 vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def token_id(token: str, more: Sequence[str] = ()) -> int:
    """Id of a special token, of one of the `more` that a model has, or of an ASCII character: the byte itself."""
    named = [*_SPECIAL, *more]
    return 256 + named.index(token) if token in named else ord(token)


def golden() -> list[dict[str, Any]]:
    """Two prompts with the ids that the template and the vocabulary give."""
    prompts = []
    for question in ("How are you?", "What is a shell?"):
        messages = [{"role": "user", "content": question}]
        text = [*("<|turn|>", *f"user\n{question}"), "<|fin|>", *("<|turn|>", *"assistant\n")]
        prompts.append({"messages": messages, "prompt_ids": [token_id(token) for token in text]})
    return prompts


def write_gguf(
    path: Path,
    *,
    eos: str = "<|fin|>",
    answer: Sequence[str] = ANSWER,
    template: str = CHAT_TEMPLATE,
    context: int = CONTEXT,
) -> Path:
    """Write the model; with another `eos` than "<|fin|>" its answers do not end.

    The `answer` consists of different pieces, each a token: an ASCII character or any longer text.
    """
    assert len(set(answer)) == len(answer)
    more = [piece for piece in answer if len(piece.encode()) > 1]
    bytes_as_letters = _byte_letters()
    letters = [
        *bytes_as_letters,
        *_SPECIAL,
        *("".join(bytes_as_letters[byte] for byte in text.encode()) for text in more),
    ]
    size = len(letters)
    follows = {current: "abcdefghijklmnopqrstuvwxyz"[current % 26] for current in range(size)}
    for piece, following in zip(["\n", *answer], [*answer, "<|fin|>"], strict=True):
        follows[token_id(piece, more)] = following
    embeddings = np.eye(size, _WIDTH, dtype=np.float32)
    output = np.zeros((size, _WIDTH), dtype=np.float32)
    for current, after in follows.items():
        output[token_id(after, more), current] = 1.0

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny chat")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(context)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(9)
    writer.add_head_count_kv(9)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(letters)
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * len(_SPECIAL)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(more))
    writer.add_token_merges(["Ā ā"])  # required, and of two bytes that no text here has
    writer.add_bos_token_id(token_id("<|turn|>"))
    writer.add_eos_token_id(token_id(eos))
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", embeddings)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(_WIDTH, dtype=np.float32))
    shapes = {"attn_norm": (), "ffn_norm": (), "ffn_gate": (32,), "ffn_up": (32,)}
    shapes |= {f"attn_{name}": (_WIDTH,) for name in ("q", "k", "v", "output")}
    for name, rows in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((*rows, _WIDTH), dtype=np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((_WIDTH, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
