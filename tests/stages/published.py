"""Published tokenizers, as the pinned llama.cpp carries them for its own tests.

Its source has them as GGUF files without weights (models/ggml-vocab-*.gguf), and chat templates beside them. The byte
level ones are rebuilt by the code that unpacks a GGUF teacher; the SentencePiece ones here, from pieces and scores.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType

from toolchain.gguf import llama_cpp
from toolchain.teacher import gguf_tokenizer

LLAMA_3, LLAMA_2, PHI_3, QWEN = "llama-bpe", "llama-spm", "phi-3", "qwen2"
TEMPLATES = {
    LLAMA_3: "meta-llama-Llama-3.1-8B-Instruct",
    PHI_3: "microsoft-Phi-3.5-mini-instruct",
    QWEN: "Qwen-Qwen2.5-7B-Instruct",
}


class Published:
    """Checkpoint folders without weights, each made once below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        archive = llama_cpp.archive_path()
        if not archive.is_file():
            pytest.skip(f"{archive} is not there: `toolchain llama-cpp build` fetches it")
        wanted = {f"ggml-vocab-{name}.gguf" for name in (LLAMA_3, LLAMA_2, PHI_3, QWEN)}
        wanted |= {f"{name}.jinja" for name in TEMPLATES.values()}
        with tarfile.open(archive) as source:
            for member in source:
                name = Path(member.name).name
                if "/llama.cpp/models/" in member.name and name in wanted:
                    content = source.extractfile(member)
                    assert content is not None
                    (folder / name).write_bytes(content.read())

    def __call__(self, name: str) -> Path:
        made = self._folder / name
        if not made.exists():
            path = self._folder / f"ggml-vocab-{name}.gguf"
            tokenizer: Any = gguf_tokenizer.read_bpe(path) or _sentencepiece(path)
            if name in TEMPLATES:
                tokenizer.chat_template = (self._folder / f"{TEMPLATES[name]}.jinja").read_text()
            tokenizer.save_pretrained(made)
            (made / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokenizer)}))
        return made


def _sentencepiece(path: Path) -> Any:
    """BPE with byte fallback as Transformers makes it of a SentencePiece model: pieces merge by their scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    ids = {token: number for number, token in enumerate(tokens) if types[number] != TokenType.UNUSED}
    normal = [token for token, number in ids.items() if types[number] == TokenType.NORMAL]
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(normal, key=lambda token: -scores[ids[token]])
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    core = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    core.add_special_tokens(
        [AddedToken(token, normalized=False) for token, number in ids.items() if types[number] in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
