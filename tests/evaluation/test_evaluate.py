"""Running a model over rows."""

import math

import pytest
import torch
from builders.models import tiny_model
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite
from distill_llm.data import GLUE, collator
from distill_llm.data.kinds.masked_lm import masked_lm
from distill_llm.evaluation import evaluate_model, predict


class Tokens:
    """The parts of a tokenizer that collators read."""

    pad_token_id, pad_token_type_id, mask_token_id, padding_side, all_special_ids = 0, 0, 4, "right", [0, 1, 2, 3, 4]

    def __len__(self) -> int:
        return 100


TOKENS: PreTrainedTokenizerBase = Tokens()  # type: ignore[assignment]


def rows(count: int = 41, labels: str = "class") -> Dataset:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (count,), generator=draw).tolist()
    ids = [torch.randint(5, 100, (n,), generator=draw).tolist() for n in lengths]
    columns = {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "length": lengths}
    if labels == "class":
        columns["labels"] = [n % 2 for n in lengths]
    elif labels == "value":
        columns["labels"] = [n / 4 for n in lengths]
    return Dataset.from_dict(columns)


def one_by_one(model, data: Dataset) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in data])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predictions_equal_those_of_single_unpadded_rows_in_order(batch_size: int) -> None:
    model, data, task = tiny_model(num_labels=1), rows(labels="value"), GLUE["stsb"]
    values, labels = predict(model, data, task, collator(task, TOKENS), batch_size=batch_size, progress=False)
    torch.testing.assert_close(torch.as_tensor(values), one_by_one(model, data).squeeze(-1), atol=1e-5, rtol=1e-5)
    assert labels.tolist() == data["labels"][:]


def test_metrics_equal_scikit_learn_on_single_rows_and_training_mode_is_restored() -> None:
    model, data = tiny_model().train(), rows()
    got = evaluate_model(model, data, GLUE["mrpc"], collator(GLUE["mrpc"], TOKENS), batch_size=8, progress=False)
    assert model.training and all(module.training for module in model.modules())
    predictions = one_by_one(model.eval(), data).argmax(-1).tolist()
    assert got["accuracy"] == pytest.approx(accuracy_score(data["labels"][:], predictions))
    assert got["f1"] == got["score"] == pytest.approx(f1_score(data["labels"][:], predictions))


def test_regression_scores_the_single_output() -> None:
    task = GLUE["stsb"]
    model = tiny_model(num_labels=1)
    data = rows(labels="value")
    ideal = data.remove_columns("labels").add_column("labels", (one_by_one(model, data).squeeze(-1) * 3 + 1).tolist())
    got = evaluate_model(model, ideal, task, collator(task, TOKENS), progress=False)
    assert got["pearsonr"] == pytest.approx(1, abs=1e-5) and got["score"] == got["spearmanr"]


def test_columns_the_model_does_not_take_are_left_out() -> None:
    data = rows()
    typed = data.add_column("token_type_ids", [[0] * n for n in data["length"]])
    got = evaluate_model(tiny_model("distilbert"), typed, GLUE["sst2"], collator(GLUE["sst2"], TOKENS), progress=False)
    assert 0 <= got["score"] <= 1


def test_masked_lm_loss_is_the_mean_over_masked_tokens_and_repeatable() -> None:
    task = masked_lm("text", "text")
    model, data, make = tiny_model(head="masked-lm"), rows(labels="none"), collator(masked_lm("text", "text"), TOKENS)
    got = evaluate_model(model, data, task, make, batch_size=64, progress=False)
    ordered = sorted(data, key=lambda row: -row["length"])
    batch = make(ordered)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert got["loss"] == pytest.approx(loss, rel=1e-5) and got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert evaluate_model(model, data, task, make, batch_size=64, progress=False) == got


def test_broken_models_and_empty_data_are_refused() -> None:
    model, task = tiny_model(), GLUE["sst2"]
    with pytest.raises(InputError, match="^dataset: got 'no rows'; accepted: at least one"):
        evaluate_model(model, rows(0), task, collator(task, TOKENS), progress=False)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(NotFinite, match="^the (output|loss) of .* in scoring is nan; score a model"):
        evaluate_model(model, rows(), task, collator(task, TOKENS), progress=False)


def test_rows_without_a_token_to_predict_have_no_score() -> None:
    task = masked_lm("text", "text")
    special = Dataset.from_dict({"input_ids": [[2, 1, 1, 3]] * 3, "attention_mask": [[1] * 4] * 3, "length": [4] * 3})
    with pytest.raises(InputError, match="^dataset: got '3 rows without a token to predict'"):
        evaluate_model(tiny_model(head="masked-lm"), special, task, collator(task, TOKENS), progress=False)
