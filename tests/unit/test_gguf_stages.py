"""What the GGUF stages check before they start a program, and what they read from its output."""

import json
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from toolchain import errors
from toolchain.data.rows import Row, write_rows
from toolchain.gguf import convert, imatrix, quantize
from toolchain.gguf.header import GgufFacts, Tensor
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Imatrix
from toolchain.reporter import Silent

TOLD = [
    "warning: blk.0.attn_k.weight                  - ncols     64 not divisible by 256 "
    "(required for type    q4_K) -> falling back to    q5_0",
    "[   1/   3] token_embd.weight                   - [   64,   512,     1,     1], type =    f16, converting to q8_0",
    "llama_model_quantize_impl: WARNING: 1 of 3 tensor(s) required fallback quantization",
]


def facts(**types: str) -> GgufFacts:
    shapes = {"norm": (64,), "attn_k": (64, 32), "token_embd": (64, 512), "wide": (256, 4)}
    names = {"norm": "output_norm.weight", "attn_k": "blk.0.attn_k.weight", "token_embd": "token_embd.weight"}
    tensors = tuple(Tensor(names.get(name, name), kind, shapes[name], 1) for name, kind in types.items())
    return GgufFacts(
        architecture="llama",
        name=None,
        file_type="Q4_K_M",
        parameters=100,
        tensor_bytes=60,
        file_bytes=80,
        bits_per_weight=4.8,
        tensor_types={},
        context_length=None,
        vocabulary_size=0,
        tokenizer=None,
        pre_tokenizer=None,
        bos_id=None,
        bos_token=None,
        eos_id=None,
        eos_token=None,
        pad_id=None,
        pad_token=None,
        add_bos=None,
        add_eos=None,
        missing_bytes=None,
        chat_template=None,
        chat_template_sha256=None,
        tensors=tensors,
    )


def test_fallbacks_are_those_that_were_told_and_those_that_were_not() -> None:
    found = quantize.fallbacks_of(TOLD, facts(norm="F32", attn_k="Q5_0", token_embd="Q8_0", wide="Q4_K"), "Q4_K_M")
    assert found == [
        quantize.Fallback("blk.0.attn_k.weight", 64, "Q4_K", "Q5_0"),
        quantize.Fallback("token_embd.weight", 64, None, "Q8_0"),
    ]


def test_a_width_that_the_mix_can_hold_is_no_fallback() -> None:
    assert quantize.fallbacks_of([], facts(attn_k="Q8_0", wide="Q8_0"), "Q8_0") == []


@pytest.mark.parametrize("lines", [TOLD[:2], TOLD[1:]], ids=["no count", "no line"])
def test_output_that_contradicts_itself_is_not_believed(lines: list[str]) -> None:
    with pytest.raises(errors.ExternalToolError, match="fallbacks"):
        quantize.fallbacks_of(lines, facts(attn_k="Q5_0"), "Q4_K_M")


def test_output_that_contradicts_the_file_is_not_believed() -> None:
    with pytest.raises(errors.ExternalToolError, match="1 are not so in the file"):
        quantize.fallbacks_of(TOLD, facts(attn_k="Q4_0"), "Q4_K_M")


def test_too_little_text_is_told_in_tokens_before_anything_runs(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    write_rows(rows, [Row("0", (), "", tuple(range(100)), (1, 2), "stop")])
    nowhere = LlamaCpp(root=tmp_path / "none", commit="", key="", flags=())
    with pytest.raises(errors.DataError, match=r"102 tokens in 1 training rows.* needs 1024") as caught:
        imatrix.run(
            Imatrix(), gguf=tmp_path, rows=rows, tokenizer=tmp_path, llama=nowhere, out=tmp_path, report=Silent()
        )
    assert "imatrix.context to 64" in str(caught.value.hint)
    assert not (tmp_path / imatrix.TEXT).exists()


def test_a_checkpoint_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(errors.ModelError, match=r"only as pickle \(pytorch_model.bin\)"):
        convert.check_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(errors.ModelError, match=r"1 of 2 shards missing: model-00002-of-00002\.safetensors"):
        convert.check_checkpoint(tmp_path)


def test_a_folder_with_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=r"no config\.json"):
        convert.check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.ModelError, match=r"no \.safetensors"):
        convert.check_checkpoint(tmp_path)


def test_commands_say_what_is_asked_for() -> None:
    argv = convert.convert_argv(Path("c.py"), Path("model"), Path("out.gguf"), metadata=Path("m.json"))
    assert argv == ["c.py", "model", "--outfile", "out.gguf", "--outtype", "f16", "--metadata", "m.json"]
    argv = imatrix.imatrix_argv(Path("llama-imatrix"), Path("m.gguf"), "t.txt", "o.gguf", context=64, threads=2)
    assert argv[1:7] == ["-m", "m.gguf", "-f", "t.txt", "-o", "o.gguf"]
    assert {"--parse-special", "--no-escape"} <= set(argv)
    argv = quantize.quantize_argv(
        Path("llama-quantize"), Path("in.gguf"), Path("/out.gguf"), "Q4_K_M", "imatrix.gguf", plan=None, dry_run=True
    )
    assert argv[:6] == ["llama-quantize", "--imatrix", "imatrix.gguf", "--dry-run", "in.gguf", "/out.gguf"]
    assert argv[6] == "Q4_K_M"
