"""Texts that are sampled: the model's own probabilities, and numbers that belong to the row."""

import pytest
import torch
from builders.causal import causal_model, word_tokenizer
from builders.generating import tokenizer_of_words
from builders.models import tiny_model
from builders.recipes import WORDS

from distill_llm.common.errors import InputError
from distill_llm.synthesis.texts import TextSettings, TextSource


def causal_source(prompts=(), **settings):
    tokenizer = word_tokenizer()
    model = causal_model("llama")
    return TextSource(model, tokenizer, TextSettings(**{"length": 9, **settings}), prompts)


def masked_source(**settings):
    return TextSource(tiny_model(head="masked-lm", vocab=len(WORDS)), tokenizer_of_words(), TextSettings(**settings))


def test_a_causal_lm_goes_on_from_its_begin_token_or_from_prompts_as_its_logits_say():
    source = causal_source(temperature=0)
    begin = source.tokenizer.bos_token_id
    begin = source.tokenizer.eos_token_id if begin is None else begin
    (found,) = source([0])
    expected = [begin]
    for _ in range(len(found) - 1):
        expected.append(source.model(torch.tensor([expected])).logits[0, -1, : len(source.tokenizer)].argmax().item())
    assert found == expected and 2 <= len(found) <= 9
    prompted = causal_source([[5, 6, 7], [8]])
    rows = prompted([0, 1, 2])
    assert [row[:3] for row in rows[::2]] == [[5, 6, 7]] * 2 and rows[1][0] == 8 and max(map(len, rows)) <= 9


@pytest.mark.parametrize("make", [causal_source, masked_source])
def test_a_text_belongs_to_its_number_and_seed_and_not_to_its_batch(make):
    source = make()
    together = source([0, 1, 2, 3])
    assert [source([number])[0] for number in range(4)] == together
    assert len({tuple(row) for row in together}) == 4
    assert make(seed=1)([0, 1, 2, 3]) != together


def test_a_masked_lm_fills_each_place_by_its_probabilities():
    """Where the logits are the same everywhere, each word occurs as often as its probability says, and no special token does."""
    source = masked_source(length=8, sweeps=1, passes=3)
    logits = torch.arange(len(WORDS), dtype=torch.float32) / 4

    class Same(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            from types import SimpleNamespace

            return SimpleNamespace(logits=logits.expand(*input_ids.shape, -1))

    model = source.model
    model.forward = Same().forward
    rows = source(range(600))
    assert all(row[0] == 2 and row[-1] == 3 and 3 + 2 <= len(row) <= 8 for row in rows)
    words = torch.tensor([token for row in rows for token in row[1:-1]])
    shares = words.bincount(minlength=len(WORDS)) / len(words)
    expected = logits.clone()
    expected[:5] = -torch.inf
    expected = expected.softmax(-1)
    assert shares[:5].sum() == 0
    assert (shares - expected).abs().max() < 4 * (0.25 / len(words)) ** 0.5


def test_each_pass_of_a_masked_lm_hides_its_own_places_and_sees_the_others():
    source = masked_source(length=10, sweeps=2, passes=4)
    seen, own = [], source.model.forward

    def forward(input_ids, attention_mask):
        seen.append((input_ids == source.tokenizer.mask_token_id)[0].clone())
        return own(input_ids=input_ids, attention_mask=attention_mask)

    source.model.forward = forward
    (row,) = source([0])
    counts = [int(each.sum()) for each in seen]
    length = len(row) - 2
    first, second = counts[:4], counts[4:]
    assert first[0] == length and first == sorted(first, reverse=True)
    assert sum(second) == length and max(second) <= -(-length // 4)
    assert torch.stack(seen[4:]).sum(0)[1 : length + 1].eq(1).all()


def test_a_tokenizer_without_a_mask_token_or_a_begin_is_refused():
    tokenizer = tokenizer_of_words()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match=r"^tokenizer: got 'no mask token'"):
        TextSource(tiny_model(head="masked-lm", vocab=len(WORDS)), tokenizer, TextSettings())
    with pytest.raises(InputError, match=r"^prompts: not given; give prompts"):
        TextSource(causal_model("llama"), tokenizer, TextSettings())
