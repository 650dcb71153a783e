"""What a GGUF says about itself, and what is said of one that is damaged."""

import hashlib
from pathlib import Path

import pytest

pytest.importorskip("gguf")

import gguf
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain import errors
from toolchain.gguf.header import read_facts, read_metadata

TEMPLATE = "{{ messages }} ü"


def write_gguf(path: Path) -> Path:
    """Two tensors, a few keys, four tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(128)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", "ä", "b"])
    writer.add_token_types([3, 3, 1, 1])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(9)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("blk.0.weight", np.ones((3, 64), dtype=np.float16))
    writer.add_tensor(
        "output.weight",
        gguf.quants.quantize(np.ones((2, 256), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf")


def test_the_facts_are_those_that_were_written(whole: Path) -> None:
    facts = read_facts(whole)
    assert (facts.architecture, facts.name, facts.file_type) == ("llama", "small", "Q4_K_M")
    assert facts.parameters == 3 * 64 + 2 * 256
    assert facts.tensor_bytes == 3 * 64 * 2 + 2 * 256 // 32 * 34
    assert facts.bits_per_weight == pytest.approx(facts.tensor_bytes * 8 / facts.parameters)
    assert facts.file_bytes == whole.stat().st_size
    assert facts.tensor_types == {"F16": 1, "Q8_0": 1}
    assert [(tensor.name, tensor.shape) for tensor in facts.tensors] == [
        ("blk.0.weight", (64, 3)),
        ("output.weight", (256, 2)),
    ]
    assert (facts.context_length, facts.vocabulary_size) == (128, 4)
    assert (facts.bos_id, facts.bos_token, facts.eos_id, facts.eos_token) == (0, "<s>", 1, "</s>")
    assert (facts.pad_id, facts.pad_token) == (9, None)
    assert (facts.add_bos, facts.add_eos) == (False, None)
    assert facts.missing_bytes == 255  # all but "b"
    assert facts.chat_template == TEMPLATE
    assert facts.chat_template_sha256 == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_our_reader_and_the_packages_own_agree(whole: Path) -> None:
    reader = gguf.GGUFReader(whole)
    ours = read_metadata(whole)
    theirs = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and field.types[0] != gguf.GGUFValueType.ARRAY
    }
    assert ours == theirs
    assert [tensor.bytes for tensor in read_facts(whole).tensors] == [int(t.n_bytes) for t in reader.tensors]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused_with_its_name(whole: Path, tmp_path: Path, share: float) -> None:
    # The last tensor is padded, and a file without that padding is whole.
    end = whole.stat().st_size - 32
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[: int(share * end)])
    with pytest.raises(errors.ModelError, match=r"cut\.gguf"):
        read_facts(cut)


def test_cut_tensor_data_is_told_with_what_should_be_there(whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(errors.ModelError, match=r"tensor output.weight ends at byte [\d,]+, the file has [\d,]+"):
        read_facts(cut)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, 600), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused_and_never_a_crash(whole: Path, tmp_path: Path, at: int, value: int) -> None:
    raw = bytearray(whole.read_bytes())
    raw[at] = value
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(raw)
    problem = None
    try:
        assert read_facts(changed).file_bytes == len(raw)
    except errors.ModelError as error:
        problem = error.message
    assert problem is None or "changed.gguf" in problem


@pytest.mark.parametrize(
    ("at", "what"),
    [
        (8, "tensors"),
        (16, "keys"),
        (24, "length of the first key"),
        ("blk.0.weight", "width"),
        ("blk.0.weight", "start"),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [1 << 20, 1 << 40, (1 << 64) - 32])
def test_a_file_that_lies_about_its_sizes_is_refused(
    whole: Path, tmp_path: Path, at: int | str, what: str, value: int
) -> None:
    """At once, and without memory for what it claims."""
    raw = bytearray(whole.read_bytes())
    if isinstance(at, str):
        # After the name: u32 dimensions, u64 for each of the two, u32 type, u64 start of its data.
        at = raw.index(at.encode()) + len(at) + {"width": 4, "start": 4 + 16 + 4}[what]
    raw[at : at + 8] = value.to_bytes(8, "little")
    lying = tmp_path / "lying.gguf"
    lying.write_bytes(raw)
    with pytest.raises(errors.ModelError, match=r"lying\.gguf"):
        read_facts(lying)


def test_something_else_is_no_gguf(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(errors.ModelError, match="not a GGUF"):
        read_facts(other)
    with pytest.raises(errors.ModelError, match="No such file"):
        read_facts(tmp_path / "missing.gguf")
