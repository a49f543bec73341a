"""The rows on which two models differ most, against each row put through both models alone."""

import pytest
import torch
from builders.causal import causal_model, word_tokenizer
from builders.models import tiny_model
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from distill_llm.data import GLUE, collator
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.evaluation.disagreements import MOST_ROWS, find_disagreements


class Tokens:
    """The parts of a tokenizer that collators read."""

    pad_token_id, pad_token_type_id, padding_side = 0, 0, "right"


TOKENS: PreTrainedTokenizerBase = Tokens()  # type: ignore[assignment]


def rows(count: int = 23) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=draw).tolist()
    ids = [torch.randint(5, 100, (n,), generator=draw).tolist() for n in lengths]
    columns = {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "length": lengths}
    return Dataset.from_dict({**columns, "labels": [n % 2 for n in lengths]})


def alone(model, data: Dataset) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in data])


def loud(model, seed: int):
    """The model with a head that is sure of itself, at random."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    return model.eval()


def test_classes_differ_by_the_probability_that_moved() -> None:
    data, task = rows(), GLUE["mrpc"]
    teacher, student = (loud(tiny_model(seed=seed), seed) for seed in (0, 1))
    found = find_disagreements(teacher, student, data, task, collator(task, TOKENS), count=5, batch_size=4)
    theirs, ours = (alone(model, data).softmax(-1) for model in (teacher, student))
    moved = (theirs - ours).clamp(min=0).sum(-1)
    expected = moved.argsort(descending=True)[:5].tolist()
    assert [each.row for each in found.examples] == expected
    same = (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    assert 0 < same < 1 and found.agreement == pytest.approx(same) and found.rows == 23
    names = task.label_names or ()
    for each in found.examples:
        assert each.distance == pytest.approx(moved[each.row].item(), abs=1e-5)
        assert each.truth == names[data[each.row]["labels"]]
        for answer, shares in ((each.teacher, theirs), (each.student, ours)):
            share, place = shares[each.row].max(-1)
            assert answer.says == names[int(place)] and answer.share == pytest.approx(share.item(), abs=1e-5)


def test_values_differ_by_their_distance_and_equal_models_in_nothing() -> None:
    data, task = rows(), GLUE["stsb"]
    data = data.remove_columns("labels").add_column("labels", [n / 4 for n in data["length"]])
    teacher, student = (tiny_model(num_labels=1, seed=seed).eval() for seed in (0, 1))
    found = find_disagreements(teacher, student, data, task, collator(task, TOKENS), count=3)
    apart = (alone(teacher, data) - alone(student, data)).abs().squeeze(-1)
    assert [each.row for each in found.examples] == apart.argsort(descending=True)[:3].tolist()
    assert found.agreement is None and found.examples[0].truth == f"{data[found.examples[0].row]['labels']:.4g}"
    assert not find_disagreements(teacher, teacher, data, task, collator(task, TOKENS), count=3).examples


def test_language_models_differ_by_the_mean_loss_of_a_rows_tokens() -> None:
    tokenizer, task = word_tokenizer(), causal_lm("text", "text")
    data = rows()
    ids = [[5 + i % 20 for i in row] for row in data["input_ids"]]
    data = data.remove_columns(["labels", "input_ids"]).add_column("input_ids", ids).add_column("labels", ids)
    teacher, student = causal_model("llama"), causal_model("llama", intermediate_size=48)
    found = find_disagreements(teacher, student, data, task, collator(task, tokenizer), count=4, batch_size=8)
    losses = torch.tensor(
        [
            [model(input_ids=torch.tensor([each]), labels=torch.tensor([each])).loss.item() for each in ids]
            for model in (teacher, student)
        ]
    )
    apart = (losses[0] - losses[1]).abs()
    assert [each.row for each in found.examples] == apart.argsort(descending=True)[:4].tolist()
    first = found.examples[0]
    assert first.truth is None and first.teacher.says == f"loss {losses[0][first.row]:.4g}"


def test_of_many_rows_some_are_looked_at_from_the_first_to_the_last() -> None:
    from distill_llm.evaluation.disagreements import _spread

    many = Dataset.from_dict({"length": [10] * 9000})
    chosen = _spread(many)
    assert len(chosen) == len(set(chosen)) == MOST_ROWS and (chosen[0], chosen[-1]) == (0, 8999)
    assert len(_spread(Dataset.from_dict({"length": [5000] * 100}))) == 32
