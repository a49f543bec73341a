"""Tiny tokenizers of the kinds that people use, with vocabularies that are known by heart."""

import re
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
MARKS = ["<|assistant|>", "<|user|>", "<|end|>", "<think>", "</think>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+=:?."
MERGES = [("▁", "4"), ("y", "e"), ("ye", "s"), ("▁", "yes"), ("b", "c"), ("▁", "a")]


def _vocabulary(*pieces: str) -> dict[str, int]:
    bytes_ = (f"<0x{number:02X}>" for number in range(256))
    return {piece: number for number, piece in enumerate([*SPECIAL.values(), *bytes_, "▁", *LETTERS, *pieces])}


def llama_tokenizer(**settings: Any) -> PreTrainedTokenizerBase:
    """As Llama's of today: a word-begin mark before the first word of a text."""
    vocabulary = _vocabulary(*("".join(pair) for pair in MERGES))
    made = LlamaTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=1000, **settings)
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def sentencepiece_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama 2's: a word-begin mark before the first word of a text, and before the first after every special token."""
    vocabulary = _vocabulary(*("".join(pair) for pair in MERGES))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return _fast(backend)


def unigram_tokenizer() -> PreTrainedTokenizerBase:
    """As those of T5's and Gemma's kind: the likeliest pieces."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "▁\n" + LETTERS)]
    backend = Tokenizer(models.Unigram([*pieces, ("▁yes", -2.0), ("yes", -3.0), ("▁4", -2.5)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _fast(backend)


def bytes_tokenizer(trim_offsets: bool = False) -> PreTrainedTokenizerBase:
    """As GPT-2's, whose offsets may leave out the space that a token begins with."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("Ġ", "yes"), ("b", "c"), ("Ċ", "Ċ")]
    names = [*SPECIAL.values(), *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return _fast(backend)


def _fast(backend: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=1000, additional_special_tokens=MARKS, **SPECIAL
    )


class SlowTokenizer(PreTrainedTokenizer):
    """In Python, without offsets: a piece per letter, `bc` as one, and a word-begin mark for each space and the beginning."""

    def __init__(self, **settings: Any):
        self.pieces = _vocabulary("bc", "\n")
        super().__init__(**SPECIAL, model_max_length=1000, **settings)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {**self.pieces, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        marked = "▁" + text.replace(" ", "▁")
        return re.findall("bc|.", marked, re.DOTALL)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return {number: piece for piece, number in self.pieces.items()}[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").removeprefix(" ")
