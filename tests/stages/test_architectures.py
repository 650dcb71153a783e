"""Every family that students are of: a tiny random checkpoint with a tokenizer of its kind goes through to Q4_K_M."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")

import torch

from tests.stages.gguf_files import to_gguf, to_matrix
from tests.stages.published import LLAMA_3, QWEN
from tests.tiny import make_tiny_checkpoint
from toolchain.gguf import convert, quantize
from toolchain.gguf.checkpoint import PROBES
from toolchain.gguf.header import read_facts
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Quantize
from toolchain.reporter import Silent

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

SENTENCEPIECE, WITH_SPACE_PREFIX = "SentencePiece", "SentencePiece with a space before every text"
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
FAMILIES = {
    "Llama 2": ("LlamaConfig", SENTENCEPIECE, {}),
    "Llama 3": ("LlamaConfig", LLAMA_3, {}),
    "Qwen 2": ("Qwen2Config", QWEN, {}),
    "Qwen 3": ("Qwen3Config", QWEN, {"head_dim": 64}),
    "Phi 3": ("Phi3Config", WITH_SPACE_PREFIX, {"original_max_position_embeddings": 1024, "sliding_window": 512}),
    "Gemma 3": (
        "Gemma3TextConfig",
        SENTENCEPIECE,
        # llama.cpp takes the head's width for it, as every published size of up to 12 B has it.
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512},
    ),
}


def make(folder: Path, config: str, tokenizer: str, more: dict[str, Any], published: Callable[[str], Path]) -> Path:
    """A checkpoint of that architecture with a SentencePiece tokenizer of 512 ids, or a published byte-level one."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = make_tiny_checkpoint(folder, prefix=tokenizer == WITH_SPACE_PREFIX)
    (made / "model.safetensors").unlink()
    own = tokenizer in {SENTENCEPIECE, WITH_SPACE_PREFIX}
    if not own:
        (made / "tokenizer.model").unlink()
        for path in published(tokenizer).iterdir():
            if path.name != "config.json":
                (made / path.name).write_bytes(path.read_bytes())
    loaded = AutoTokenizer.from_pretrained(made)
    end = {"bos_token_id": loaded.bos_token_id, "eos_token_id": loaded.eos_token_id}
    pad = {"pad_token_id": loaded.pad_token_id if loaded.pad_token_id is not None else loaded.eos_token_id}
    described = getattr(transformers, config)(
        vocab_size=len(loaded), tie_word_embeddings=not own, **SHAPE, **more, **end, **pad
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    model.to(torch.float16).save_pretrained(made)
    (made / "generation_config.json").write_text(json.dumps({**end, **pad}))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_converted_with_its_tokenizer_template_and_logits_and_quantized(
    family: str, published: Callable[[str], Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    from toolchain.data.rows import Row, write_rows
    from toolchain.student.load import load_tokenizer

    model = make(tmp_path / "model", *FAMILIES[family], published)
    metrics = to_gguf(model, tmp_path, llama)
    assert 0 <= metrics["mean_kl"] <= 1e-3
    assert metrics["tokenizer_probes"] > 2 * len(PROBES)
    assert metrics["read_as_control"] == (("</s>",) if "Qwen" in family else ())
    tokenizer = load_tokenizer(model)
    ids = tuple(tokenizer("Use scp with the source first and the target after it. " * 12)["input_ids"])
    write_rows(tmp_path / "train.jsonl", [Row("0", (), "", ids[:4], ids[4:], "length")])
    matrix = to_matrix(tmp_path / convert.OUTPUT, tmp_path / "train.jsonl", model, llama, tmp_path)
    inputs = quantize.Inputs(tmp_path / convert.OUTPUT, matrix)
    found = quantize.run(Quantize(), inputs, llama=llama, out=tmp_path, report=Silent())
    facts = read_facts(tmp_path / quantize.OUTPUT)
    assert facts.file_type == "Q4_K_M"
    assert {"Q4_K", "Q6_K"} <= set(facts.tensor_types)
    assert found["fallbacks"] == []
