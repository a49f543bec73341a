"""Long texts are cut before they are tokenized, and the tokens stay the same."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from distill_llm.data.cutting import cut_text
from distill_llm.data.labelled import text_encoder

WORDS = ["good", "film", "a", "the", "unbelievable", "plot", "of", "2024", "naïve", "...", "well-made", "x" * 40]


def text_of(words: int, seed: int = 0, gap: str = " ") -> str:
    generator = random.Random(seed)
    return gap.join(generator.choice(WORDS) for _ in range(words))


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind, trained on such texts."""
    texts, special = [text_of(300, seed) for seed in range(5)], ["<unk>", "<pad>"]
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    elif kind == "metaspace":
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


def word_pieces() -> BertTokenizer:
    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789.-" for mark in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film", "un", "##believ", *letters]
    return BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})


KINDS = ["byte-level", "metaspace", "unigram", "word pieces"]
LONG = {
    "words": text_of(1500),
    "lines": text_of(1000, 1, "\n\n  "),
    "no space": "ab" * 4000,
    "one word": "z" * 6000,
    "spaces": " " * 6000 + text_of(800, 2),
    "short": text_of(5),
    "empty": "",
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_text(kind, side):
    tokenizer = word_pieces() if kind == "word pieces" else trained(kind)
    tokenizer.truncation_side = side
    for name, text in LONG.items():
        for length in (8, 33, 128):
            wanted = tokenizer([text], truncation=True, max_length=length)["input_ids"]
            found = text_encoder(("text",), tokenizer, length)({"text": [text], "labels": [0]})["input_ids"]
            assert found == wanted, (name, length)


def test_of_pairs_each_text_is_cut():
    tokenizer = word_pieces()
    one, other = text_of(200), text_of(150, 1)  # few: the overflow of a whole pair grows with the square
    rows = {"text": [one, "good film", one], "text_pair": ["a plot", other, other]}
    wanted = tokenizer(*rows.values(), truncation=True, max_length=33)["input_ids"]
    assert text_encoder(("text", "text_pair"), tokenizer, 33)({**rows, "labels": [0] * 3})["input_ids"] == wanted


def test_of_a_field_of_many_megabytes_little_is_tokenized(monkeypatch):
    tokenizer, seen = word_pieces(), []
    own = tokenizer.__class__.__call__
    monkeypatch.setattr(
        tokenizer.__class__, "__call__", lambda self, text, *a, **k: seen.append(text) or own(self, text, *a, **k)
    )
    part = cut_text("good film " * 5_000_000, tokenizer, 128)
    assert len(part) < 20_000 and sum(map(len, seen)) < 20_000
