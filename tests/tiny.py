"""A tiny Llama checkpoint with a real tokenizer and chat template, made in a second and without a download.

The tokenizer is a SentencePiece BPE with byte fallback, kept both as `tokenizer.model`, which llama.cpp's converter
reads, and as `tokenizer.json`, which Transformers reads: byte-level BPE would not do, because the converter knows such
tokenizers only by a hash over those of published models.
"""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

TOKENIZER_SIZE = 512
"""Most ids of the tokenizer; a larger `vocabulary` leaves ids that no token has, as real padded checkpoints do."""
SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>", "<pad>")
"""Ids 0 to 3: unknown, bos, eos (which ends a turn), pad."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_CORPUS = """\
user
assistant
system
You are a helpful assistant who answers questions about the command line in one short sentence.
What does the command ls do? It lists the files and folders of a directory, one entry for each name.
How do I copy a file to another machine? Use scp with the source first and the target after it.
Show the last ten lines of a log file. The command tail prints the end of a file.
How can I find which process uses a port? Run ss with the listening option and look at the last column.
Create a new branch and switch to it. Use git switch with the create option and the name of the branch.
Delete every file that ends in .pyc below this folder. Use find with the name and delete options.
def main(argument: int) -> int: return argument + 1
for number in range(10): print(number, number * number)
The quick brown fox jumps over the lazy dog, while 0 1 2 3 4 5 6 7 8 9 are digits.
"""


@cache
def _sentencepiece(size: int, prefix: bool) -> bytes:
    """A SentencePiece model with `size` pieces, trained on the corpus above."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=SPECIAL[0],
        bos_piece=SPECIAL[1],
        eos_piece=SPECIAL[2],
        pad_piece=SPECIAL[3],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_of(model: bytes, template: str, *, prefix: bool = False) -> Any:
    """A SentencePiece model's tokenizer for Transformers: pieces merge in the order of their scores.

    `prefix`: a space before every text, as the model was trained with.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    normal = [
        piece
        for piece, i in ids.items()
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i)) and len(piece) > 1
    ]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: (-pieces.get_score(ids[piece]), ids[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    core = Tokenizer(models.BPE(ids, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[3],
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        add_prefix_space=False,
    )


def make_tiny_checkpoint(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
    vocabulary: int = 512,
    dtype: str = "float16",
    prefix: bool = False,
) -> Path:
    """Write a Hugging Face checkpoint folder: config, safetensors, tokenizer with chat template, generation config.

    `prefix`: the tokenizer puts a space before every text.
    `hidden` is a multiple of 8. `vocabulary` (at least 320) is the model's; the tokenizer has at most `TOKENIZER_SIZE`
    ids. The same `vocabulary` gives the same tokenizer. Weights depend on every argument and are large enough for
    logits that differ by several units. Returns `path`.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    path.mkdir(parents=True, exist_ok=True)
    proto = _sentencepiece(min(vocabulary, TOKENIZER_SIZE), prefix)
    tokenizer = tokenizer_of(proto, CHAT_TEMPLATE, prefix=prefix)
    tokenizer.save_pretrained(path)
    (path / "tokenizer.model").write_bytes(proto)
    # Transformers 5 does not write these keys, and llama.cpp adds bos where they are missing.
    tokenizer_config = path / "tokenizer_config.json"
    raw = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    raw |= {"add_bos_token": False, "add_eos_token": False}
    tokenizer_config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=1.5 / hidden**0.5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model.save_pretrained(path)
    # Written by hand so that its order and content do not depend on the Transformers release.
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}) + "\n", encoding="utf-8"
    )
    return path


BYTE_LEVEL_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + "
    "'</s>' }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


def give_byte_level_tokenizer(path: Path) -> Path:
    """Put another tokenizer into a tiny checkpoint: byte-level BPE, other special tokens, another template; at most 512
    ids, which the checkpoint must have. The answer follows the prompt with a space between, as in Llama-2's template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_CORPUS.splitlines(), trainer)
    for old in ("tokenizer.model", "chat_template.jinja"):
        (path / old).unlink(missing_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=BYTE_LEVEL_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(path)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    (path / "generation_config.json").write_text(json.dumps(ids) + "\n", encoding="utf-8")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | ids, indent=2) + "\n", encoding="utf-8")
    return path
