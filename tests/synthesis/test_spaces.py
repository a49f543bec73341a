"""Inputs that are no text: rows of embeddings are read as the tokens that they are of, and stay in their space."""

import pytest
import torch
from builders.causal import causal_model
from builders.models import tiny_model
from builders.recipes import WORDS
from transformers import BertTokenizer

from distill_llm.common.errors import InputError
from distill_llm.models.inputs import forward_inputs
from distill_llm.synthesis.spaces import EmbeddingSpace, PixelSpace, frame_of


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "llama"])
def test_a_model_reads_embeddings_of_tokens_as_it_reads_the_tokens(family):
    model = causal_model("llama") if family == "llama" else tiny_model(family)
    ids = torch.randint(3, model.config.vocab_size, (3, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**batch).logits
    embeddings = model.get_input_embeddings()(ids)
    given = {**batch, "input_ids": torch.full_like(ids, 3), "inputs_embeds": embeddings}
    torch.testing.assert_close(model(**forward_inputs(model, given)).logits, expected)


def test_embeddings_have_the_mean_and_spread_of_the_vocabulary_and_special_tokens_their_own(tokenizer):
    model = tiny_model(vocab=len(WORDS))
    table = model.get_input_embeddings().weight.detach()
    space = EmbeddingSpace.of(model, tokenizer, 6)
    assert frame_of(tokenizer) == ([2], [3])
    values = torch.randn(4, 6, 32)
    rows = space.whole(values)
    torch.testing.assert_close(rows[:, 0], table[2].expand(4, -1))
    torch.testing.assert_close(rows[:, 5], table[3].expand(4, -1))
    torch.testing.assert_close(rows[:, 1:5], table.mean(0) + table.std(0) * values[:, 1:5])
    batch = space.batch(rows)
    assert batch["input_ids"].tolist() == [[2, 1, 1, 1, 1, 3]] * 4 and batch["attention_mask"].all()
    with pytest.raises(InputError, match=r"^length: got 2; accepted: at least 3"):
        EmbeddingSpace.of(model, tokenizer, 2)


def test_pixels_are_cut_off_at_their_bounds():
    space = PixelSpace.of((1, 2, 2), 0.0, 1.0)
    values = torch.tensor([-3.0, 0.0, 0.5, 3.0]).reshape(1, 1, 2, 2)
    assert space.batch(space.whole(values))["pixel_values"].flatten().tolist() == [0.0, 0.5, 0.75, 1.0]
    with pytest.raises(InputError, match=r"^high: got 0.0"):
        PixelSpace.of((1, 2, 2), 0.0, 0.0)
