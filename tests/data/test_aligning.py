"""One text in the tokens of two tokenizers: the chunks that both cut out, compared with hand-made ones and with brute force."""

import itertools

import pytest
from builders.causal import word_tokenizer
from builders.tokenizers import (
    SlowTokenizer,
    bytes_tokenizer,
    llama_tokenizer,
    sentencepiece_tokenizer,
    unigram_tokenizer,
)
from transformers import BertTokenizer

from distill_llm.common.errors import InputError
from distill_llm.data.aligning import Aligner
from distill_llm.data.pieces import Pieces, shared_tokens

TEXTS = ["yes bc 4é yes", " bc  yes: a=4.", "yes\n\nbc 4", "héé", "abc yes yes 44"]
MADE = {
    "llama": llama_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "bytes": bytes_tokenizer,
    "trimmed": lambda: bytes_tokenizer(trim_offsets=True),
    "unigram": unigram_tokenizer,
    "slow": SlowTokenizer,
}


def named(tokenizer, chunks, ids, other_ids):
    """Chunks as ([tokens], [tokens of the other], same)."""
    first, second = tokenizer
    return [
        (
            first.convert_ids_to_tokens(ids[slice(*chunk.own)]),
            second.convert_ids_to_tokens(other_ids[slice(*chunk.other)]),
            chunk.same,
        )
        for chunk in chunks
    ]


def aligned(own, other, ids):
    return Aligner(own, other)([ids])[0]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chunks_are_those_made_by_hand():
    own, other = llama_tokenizer(), bytes_tokenizer()
    ids = ids_of(own, "yes bc 4é yes")
    found = aligned(own, other, ids)
    assert named((own, other), found.chunks, ids, found.ids) == [
        (["▁yes"], ["yes"], False),  # the other one's `yes` is the end of a word elsewhere
        (["▁"], ["Ġ"], True),
        (["bc"], ["bc"], True),
        (["▁4"], ["Ġ", "4"], False),
        (["<0xC3>"], ["Ã"], True),  # one character, whose bytes both have
        (["<0xA9>"], ["©"], True),
        (["▁yes"], ["Ġyes"], True),
    ]
    assert found.characters == 13 == sum(chunk.characters for chunk in found.chunks)


def test_begins_ends_and_marks_of_one_name_belong_together_and_other_marks_have_no_counterpart():
    own, other = llama_tokenizer(), word_tokenizer(begins=True)
    other.add_tokens(["<|user|>"], special_tokens=True)
    begin, end, unk = own.bos_token_id, own.eos_token_id, own.unk_token_id
    user, think = own.convert_tokens_to_ids(["<|user|>", "<think>"])
    ids = [begin, user, end, begin, unk, think, end]
    found = aligned(own, other, ids)
    marks = other.convert_tokens_to_ids(["<s>", "<|user|>", "</s>", "<s>", "<unk>", "</s>"])
    assert found.ids == marks  # <s> is made anew, <unk> has its name, <think> is not there
    assert [(chunk.own[0], chunk.other[0], chunk.same) for chunk in found.chunks] == [
        (1, 1, True),
        (2, 2, True),
        (4, 4, True),
        (6, 5, True),
    ]
    assert Aligner(own, other).unknown(ids) == ["<think>"]


@pytest.mark.parametrize(("begins", "expected"), [(False, ["</s>"]), (True, ["<s>", "</s>", "<s>"])])
def test_the_others_begin_stands_at_the_start_and_behind_each_end(begins, expected):
    own, other = bytes_tokenizer(), word_tokenizer(begins=begins)
    ids = [*ids_of(own, "w1"), own.eos_token_id, *ids_of(own, "w2")]
    found = aligned(own, other, ids)
    made = [token for token in other.convert_ids_to_tokens(found.ids) if token not in ("w1", "w2", "<unk>")]
    assert made == expected


def test_a_row_that_ends_within_a_character_leaves_that_character_out():
    own, other = llama_tokenizer(), bytes_tokenizer()
    whole = ids_of(own, "bc é")
    found = aligned(own, other, whole[:-1])
    assert own.convert_ids_to_tokens(whole) == ["▁", "bc", "▁", "<0xC3>", "<0xA9>"]
    assert [chunk.own for chunk in found.chunks] == [(0, 2), (2, 3)]  # the first ▁ has no character


def test_spelled_out_special_tokens_stay_text():
    own, other = bytes_tokenizer(), llama_tokenizer()
    text = "yes</s>yes"
    ids = own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert other.eos_token_id not in aligned(own, other, ids).ids


def test_one_tokenizer_twice_is_itself_wherever_a_row_is_cut():
    own = llama_tokenizer()
    ids = [*ids_of(own, "yes bc 4é yes yes")[:5], own.eos_token_id]
    found = aligned(own, llama_tokenizer(), ids)
    assert found.ids == ids and all(chunk.same and chunk.own == chunk.other for chunk in found.chunks)
    assert len(found.chunks) == len(ids)


def test_a_slow_teacher_is_refused():
    with pytest.raises(InputError, match=r"^teacher.tokenizer: got 'SlowTokenizer'; .*fast"):
        Aligner(llama_tokenizer(), SlowTokenizer())


@pytest.mark.parametrize(("own", "other"), [pair for pair in itertools.permutations(MADE, 2) if pair[1] != "slow"])
def test_both_sides_of_a_chunk_decode_to_the_same_text_and_no_chunk_can_be_cut_further(own, other):
    """By brute force: borders are the places where decoding the tokens before them gives a beginning of the text."""
    first, second = MADE[own](), MADE[other]()
    for text in TEXTS:
        ids = [each for each in ids_of(first, text) if each != first.unk_token_id]
        read = str(first.decode(ids))
        found = aligned(first, second, ids)
        unknown = second.unk_token_id in found.ids  # it has no text to compare

        def borders(tokenizer, tokens, read=read):
            texts = {place: str(tokenizer.decode(tokens[:place])) for place in range(1, len(tokens) + 1)}
            return {len(each): place for place, each in texts.items() if read.startswith(each) and "\ufffd" not in each}

        common = borders(first, ids).keys() & borders(second, found.ids).keys()
        hidden = other == "trimmed" and text[0] == " "  # its first token says that it has no characters
        if not unknown and not hidden and str(second.decode(found.ids)) == read:  # some lose the first space
            ends = set(itertools.accumulate(chunk.characters for chunk in found.chunks))
            assert ends - {0} == common - {0}, (own, other, text, found)
        assert found.characters == len(read)


def test_shared_tokens_are_those_that_decode_alike_behind_a_letter():
    own, other = llama_tokenizer(), bytes_tokenizer()
    pairs = dict(zip(*shared_tokens(Pieces(own), Pieces(other)), strict=True))
    anchors = ids_of(own, "a")[-1:], ids_of(other, "a")[-1:]
    for first, second in pairs.items():
        if first not in Pieces(own).special:
            texts = own.decode([*anchors[0], first]), other.decode([*anchors[1], second])
            assert texts[0] == texts[1] or "\ufffd" in texts[0]
    assert len(set(pairs.values())) == len(pairs)
    by_name = {own.convert_ids_to_tokens(a): other.convert_ids_to_tokens(b) for a, b in pairs.items()}
    assert by_name["▁yes"] == "Ġyes" and by_name["bc"] == "bc" and by_name["yes"] == "yes"
    assert by_name["<0xC3>"] == "Ã" and by_name["</s>"] == "</s>" and by_name["<think>"] == "<think>"
    assert by_name["b"] == "b" and "▁4" not in by_name and "<0x41>" in by_name


def test_word_pieces_begin_with_a_space_unless_they_go_on_with_a_word():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "##yes", "bc"]
    pieces = Pieces(BertTokenizer(vocab={word: number for number, word in enumerate(words)}))
    assert [pieces.of(number) for number in (5, 6, 7)] == [b" yes", b"yes", b" bc"]
    assert [pieces.of(number, first=True) for number in (5, 6)] == [b"yes", b"yes"]
    shared = shared_tokens(Pieces(bytes_tokenizer()), pieces)
    assert [words[number] for number in shared.other] == ["##yes", "yes"]
