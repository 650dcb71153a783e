"""The tokenizer inside a GGUF → a Hugging Face one that splits text as llama.cpp does.

Transformers' own conversion keeps the vocabulary and loses the pre-tokenizer: for SmolLM2 it splits digits and white
space otherwise, so a student would learn on ids that the device never sees. Here a byte-level BPE is rebuilt with the
split that `tokenizer.ggml.pre` names (patterns: llama.cpp's src/llama-vocab.cpp); an unknown name is an error.
"""

from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from toolchain.errors import ModelError

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _pattern(regex: str) -> Any:
    split = pre_tokenizers.Split(Regex(regex), "isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _pre_tokenizer(name: str, path: Path) -> Any:
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])
    if name == "gpt-2":
        return _gpt2()
    if name == "llama-bpe":
        return _pattern(_WORDS + "{1,3}" + _REST)
    if name == "qwen2":
        return _pattern(_WORDS + _REST)
    raise ModelError(
        f"{path}: how its tokenizer ('{name}') splits text is not known here",
        hint="give the model as a Hugging Face folder, whose tokenizer.json says it",
    )


def read_bpe(path: Path) -> PreTrainedTokenizerFast | None:
    """The byte-level BPE tokenizer of a GGUF with its chat template, or None when it is of another kind.

    Raises ModelError when its split is not known.
    """
    fields = GGUFReader(path).fields

    def value(key: str) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return None if field is None else field.contents()

    if value("ggml.model") != "gpt2":
        return None
    name = value("ggml.pre") or "default"
    tokens, merges, types = value("ggml.tokens"), value("ggml.merges"), value("ggml.token_type")
    model = BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
        # Llama 3 takes a whole word that is a token as it is, without merging up to it.
        ignore_merges=name == "llama-bpe",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(name, path)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    # In the order of their ids, so that each keeps its own.
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {
        f"{role}_token": tokens[number]
        for role, key in roles.items()
        if (number := value(f"ggml.{key}_token_id")) is not None
    }
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    result.chat_template = value("chat_template")
    return result
