"""Scores of rows that leave at a threshold, and the threshold that is chosen, against loops in plain Python."""

import math

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from datasets import Dataset

from distill_llm import with_exits
from distill_llm.data.kinds.classification import classification
from distill_llm.data.padding import LENGTH
from distill_llm.evaluation.exits import ExitAnswers, chosen_threshold, exit_answers

TASK = classification("classification", ("text",), ("a", "b", "c"))


def answers(rows=60, seed=0):
    """Two exits and a deepest head that are right more and more often, and surer where they are."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, rows)
    logits = draw.normal(size=(rows, 3, 3))
    for place, strength in enumerate((0.8, 1.6, 2.4)):
        logits[np.arange(rows), place, labels] += strength * draw.uniform(0.3, 2, rows)
    return ExitAnswers(torch.tensor(logits, dtype=torch.float32), labels, (2, 4, 6), TASK)


def by_hand(given, threshold):
    """Accuracy, mean layers and shares of rows."""
    right, layers, left = 0, 0, [0, 0, 0]
    for row, label in zip(given.logits.tolist(), given.labels, strict=True):
        for place in range(3):
            powers = [math.exp(value) for value in row[place]]
            if place == 2 or max(powers) / sum(powers) > threshold:
                right += row[place].index(max(row[place])) == label
                layers += given.layers[place]
                left[place] += 1
                break
    rows = len(given.labels)
    return right / rows, layers / rows, [count / rows for count in left]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.83, 1.0])
def test_a_score_at_a_threshold_is_that_of_the_heads_at_which_rows_leave(threshold):
    given = answers()
    found, (score, layers, left) = given.at(threshold), by_hand(given, threshold)
    assert found.score == pytest.approx(score) and found.layers == pytest.approx(layers)
    assert list(found.left) == pytest.approx(left)
    assert found.standard_error == pytest.approx(math.sqrt(score * (1 - score) / 60), rel=0.02)
    assert given.at(None) == given.at(1.0) == given.of_exit(2)
    assert given.of_exit(0) == given.at(0.0)


@pytest.mark.parametrize("within", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_with_the_fewest_layers_within_the_standard_errors_is_chosen(within, seed):
    given = answers(seed=seed)
    whole, error = by_hand(given, 1.0)[0], given.at(None).standard_error
    near = [
        (by_hand(given, each)[1], each)
        for each in given.candidates()
        if by_hand(given, each)[0] >= whole - within * error - 1e-9
    ]
    found = chosen_threshold(given, within)
    if not near or min(near)[0] == 6:
        assert found is None
    else:
        assert by_hand(given, found)[1] == pytest.approx(min(near)[0]) and found in given.candidates()
        assert by_hand(given, found)[0] >= whole - within * error - 1e-9


def test_no_threshold_is_chosen_where_every_exit_is_wrong():
    given = answers()
    wrong = given.logits.clone()
    wrong[:, :2] = torch.nn.functional.one_hot(torch.tensor((given.labels + 1) % 3), 3)[:, None] * 9.0
    assert chosen_threshold(ExitAnswers(wrong, given.labels, given.layers, TASK), 1.0) is None


def test_answers_are_those_of_all_heads_in_the_order_of_the_rows():
    model = with_exits(tiny_model(layers=3, num_labels=3), [1, 2])
    batch = random_batch(model, batch=7, padded=False)
    lengths = [7, 10, 3, 9, 4, 10, 5]  # neither rising nor falling: batches are made by length
    batch["attention_mask"] = (torch.arange(10) < torch.tensor(lengths)[:, None]).long()
    batch["input_ids"] *= batch["attention_mask"]
    rows = {"input_ids": [ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)]}
    rows |= {"labels": batch["labels"].tolist(), LENGTH: lengths}

    def collate(features):
        longest = max(len(each["input_ids"]) for each in features)
        ids = torch.tensor([each["input_ids"] + [0] * (longest - len(each["input_ids"])) for each in features])
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([each["labels"] for each in features]),
        }

    found = exit_answers(model.train(), Dataset.from_dict(rows), TASK, collate, batch_size=3)  # no dropout in scoring
    assert model.training
    model.eval()
    with torch.no_grad():
        given = model(**batch, output_exits=True)
    torch.testing.assert_close(found.logits[:, :2], given.exit_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits[:, 2], given.logits, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == batch["labels"].tolist() and found.layers == (1, 2, 3)
