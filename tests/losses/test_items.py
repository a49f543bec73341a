"""Which outputs count and which label is whose: against loops over rows and positions."""

import pytest
import torch
import transformers
from builders.models import tiny_model

from distill_llm.losses.items import count_items, kind_of, targets, token_ids, valid_tokens

# Right padding, left padding, a hole in the labels, a row of one token, a row of padding alone.
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
LABELS = torch.arange(10, 35).view(5, 5)
LABELS[2, 1:3] = -100
BATCH = {"input_ids": torch.zeros(5, 5, dtype=torch.long), "attention_mask": MASK, "labels": LABELS}


def by_loops(batch, kind, unlabelled):
    """(flat position, label) of every output that counts."""
    found = []
    for row in range(5):
        for t in range(5):
            label_at = t + 1 if kind == "next_token" else t
            if label_at == 5 or not (MASK[row, t] and MASK[row, label_at]):
                continue
            label = batch["labels"][row, label_at].item() if "labels" in batch else None
            if label != -100 or unlabelled:
                found.append((5 * row + t, label))
    return found


@pytest.mark.parametrize("kind", ["token", "next_token"])
@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_positions_labels_and_their_number_equal_those_of_a_loop(kind, unlabelled, labels):
    batch = BATCH if labels else {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    positions, chosen = targets(batch, kind, unlabelled)
    expected = by_loops(batch, kind, unlabelled)
    assert positions.tolist() == [position for position, _ in expected]
    assert (chosen is None) == (not labels)
    if labels:
        assert chosen.tolist() == [label for _, label in expected]
    if not unlabelled:
        assert count_items(batch, kind).tolist() == [len(expected), 5, int(MASK.sum())]


def test_a_causal_lm_by_hand():
    positions, labels = targets(
        {"input_ids": torch.tensor([[7, 8, 9]]), "labels": torch.tensor([[7, -100, 9]])}, "next_token"
    )
    assert positions.tolist() == [1] and labels.tolist() == [9]


def test_without_a_mask_every_token_is_valid_and_examples_are_counted_by_their_labels():
    ids = torch.zeros(3, 2, dtype=torch.long)
    assert valid_tokens({"input_ids": ids}).all()
    assert count_items({"input_ids": ids, "labels": torch.tensor([1, -100, 0])}, "example").tolist() == [2, 3, 6]
    assert count_items({"input_ids": ids, "labels": torch.tensor([[1.0], [-100.0], [0.5]])}, "example").tolist() == [
        3,
        3,
        6,
    ]
    assert count_items({"input_ids": ids}, "example").tolist() == [3, 3, 6]


def test_the_kind_is_that_of_the_models_head():
    kinds = {
        head: kind_of(tiny_model(head=head))
        for head in ("sequence-classification", "token-classification", "masked-lm")
    }
    assert kinds == {"sequence-classification": "example", "token-classification": "token", "masked-lm": "token"}
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, pad_token_id=0)
    language_model = transformers.GPT2LMHeadModel(config)
    assert kind_of(language_model) == "next_token"
    assert kind_of(transformers.GPT2ForSequenceClassification(config)) == "example"


def test_ids_beside_embeddings_are_no_tokens():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert token_ids({"input_ids": ids}) is ids and token_ids({"pixel_values": torch.zeros(2, 1, 4, 4)}) is None
    assert token_ids({"input_ids": ids, "inputs_embeds": torch.zeros(2, 3, 8)}) is None
