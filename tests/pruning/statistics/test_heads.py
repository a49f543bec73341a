"""Heads: what an output is about, held against the loss that transformers itself computes; and heads that nobody knows."""

import pytest
import torch
import transformers
from builders.families import assert_equal, family_batch, outputs_of, uneven_plan
from transformers import BertConfig, ElectraConfig, RobertaConfig

import distill_llm
from distill_llm import InputError
from distill_llm.architectures.modes import evaluating
from distill_llm.losses.items import is_language_model, kind_of
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.masking import masked
from distill_llm.pruning.statistics.calibration_loss import calibration_loss

SIZES = {
    "num_hidden_layers": 5,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "intermediate_size": 64,
    "vocab_size": 100,
}
DECODER = {"is_decoder": True}
# The head, what its config says, and the kind of its outputs.
HEADS = {
    "BertLMHeadModel": (BertConfig, DECODER, "next_token"),
    "RobertaForCausalLM": (RobertaConfig, DECODER, "next_token"),
    "ElectraForCausalLM": (ElectraConfig, DECODER, "next_token"),
    "BertForMaskedLM": (BertConfig, {}, "token"),
    "BertForTokenClassification": (BertConfig, {"num_labels": 3}, "token"),
    "BertForNextSentencePrediction": (BertConfig, {}, "example"),
    "BertForMultipleChoice": (BertConfig, {}, "example"),
    "BertForSequenceClassification": (BertConfig, {"num_labels": 3}, "example"),
}


def made(name: str):
    config, own, _ = HEADS.get(name, (getattr(transformers, name).config_class, {}, None))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**SIZES, pad_token_id=0, max_position_embeddings=64, **own))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def labelled(model) -> dict[str, torch.Tensor]:
    batch = family_batch(model)
    if kind_of(model) == "example":
        return batch | {"labels": torch.tensor([0, 1, 1])}
    labels = batch["input_ids"] if is_language_model(model) else batch["input_ids"] % 3
    return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_calibration_is_transformers_own_whatever_return_dict_says(name):
    model, kind = made(name), HEADS[name][2]
    batch = labelled(model)
    items = {"example": 3, "token": 36 - 9, "next_token": 36 - 9 - 3}[kind]  # three rows of 12 tokens, 9 of padding
    with torch.no_grad():
        expected = model(**batch).loss * items
        for return_dict in (True, False):
            model.config.return_dict = return_dict
            with evaluating(model):
                found = calibration_loss(model, batch, "labels", None, torch.Generator())
            assert model.config.return_dict == return_dict
            assert torch.allclose(found, expected, rtol=1e-5), return_dict
    assert kind_of(model) == kind
    assert is_language_model(model) == (kind == "next_token" or "MaskedLM" in name)
    distill_llm.collect_statistics(model, [batch])


def test_the_causal_head_of_an_encoder_is_pruned_as_any(tmp_path):
    model = made("BertLMHeadModel")
    batch, plan = family_batch(model), uneven_plan(model, hidden=True)
    student = distill_llm.prune(model, plan)
    with masked(model, plan):
        expected = outputs_of(model, batch)
    assert_equal(outputs_of(student, batch), expected)
    student.config.return_dict = False
    student.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded).__name__ == "PrunedBertLMHeadModel" and loaded.config.return_dict
    assert_equal(outputs_of(loaded, batch), expected)


@pytest.mark.parametrize("name", ["BertForPreTraining", "ElectraForPreTraining", "BertModel"])
def test_a_head_whose_outputs_nobody_knows_is_refused_in_one_line(name):
    model = made(name)
    for loss in ("labels", "kl"):
        with pytest.raises(InputError, match=f"^model: got '{name}.*accepted: a model whose class ends in") as caught:
            distill_llm.collect_statistics(
                model, [family_batch(model) | {"labels": torch.tensor([0, 1, 1])}], loss=loss
            )
        assert "\n" not in str(caught.value)
    distill_llm.collect_statistics(model, [family_batch(model)], loss=None)
