"""What kinds of tasks say of themselves agrees with transformers, with the losses, and with the recipe."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from builders.causal import causal_model
from builders.models import tiny_model
from transformers import AutoConfig

from distill_llm.common.errors import InputError
from distill_llm.data import GLUE, DataSpec
from distill_llm.data.kinds import KINDS, kind_of_head, register
from distill_llm.data.loading import read_task
from distill_llm.losses.items import ITEMS, VOCABULARY_HEADS, is_language_model, kind_of
from distill_llm.metrics.registry import METRICS
from distill_llm.models.item_logits import packed
from distill_llm.models.output_head import output_head
from distill_llm.recipe.sections import DataSection
from distill_llm.teachers.compatibility import shared_classes
from distill_llm.training.refusals import check_model

HEADS = {"classification": "sequence-classification", "regression": "sequence-classification", "masked_lm": "masked-lm"}


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_the_head_is_that_of_the_auto_class_and_its_outputs_are_what_the_losses_take_them_for(kind) -> None:
    model = tiny_model(head=HEADS[kind.name]) if kind.name in HEADS else causal_model()
    assert kind.stock_class(model.config) is type(model) and kind.has_head([type(model).__name__])
    assert kind_of(model) == kind.item and is_language_model(model) == kind.is_language_model
    assert kind_of_head([f"Pruned{type(model).__name__}"]).auto_class == kind.auto_class


def test_a_family_without_the_head_has_no_class_for_it() -> None:
    assert KINDS["masked_lm"].stock_class(AutoConfig.for_model("llama")) is None
    assert kind_of_head(["BertForQuestionAnswering"]) is None and kind_of_head(None) is None


def test_two_objects_of_a_kind_are_equal_and_two_kinds_are_not() -> None:
    for kind in KINDS.values():
        assert kind == type(kind)() and [kind == other for other in KINDS.values()].count(True) == 1


def test_a_kind_with_a_head_of_its_own_makes_it_trainable(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, before = tiny_model(head="multiple-choice"), dict(ITEMS)
    with pytest.raises(InputError, match="^model: got 'BertForMultipleChoice'"):
        check_model(choice)
    monkeypatch.setattr("distill_llm.data.kinds.base.KINDS", {})
    monkeypatch.setitem(ITEMS, "ForMultipleChoice", "example")
    del ITEMS["ForMultipleChoice"]

    @register
    class MultipleChoice(type(KINDS["classification"])):
        name = "multiple_choice"
        auto_class = "AutoModelForMultipleChoice"
        head_classes = ("ForMultipleChoice",)

    check_model(choice)
    assert before | {"ForMultipleChoice": "example"} == ITEMS and kind_of(choice) == "example"


def test_a_head_of_a_new_language_model_is_treated_as_one_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class BertForDenoising(type(tiny_model(head="masked-lm"))):
        """A head of the user's own."""

    config = tiny_model(head="masked-lm").config
    student = BertForDenoising(config)
    larger = type(config)(**{**config.to_dict(), "vocab_size": config.vocab_size + 8})
    monkeypatch.setattr("distill_llm.data.kinds.base.KINDS", {})
    try:

        @register
        class Denoising(type(KINDS["masked_lm"])):
            name = "denoising"
            head_classes = ("ForDenoising",)

        assert is_language_model(student)
        check_model(student)
        assert output_head(student) is not None
        with packed(student, torch.tensor([1, 4])):
            assert student(input_ids=torch.zeros(2, 3, dtype=torch.long)).logits.shape == (2, config.vocab_size)
        with pytest.raises(InputError, match="a vocabulary of"):
            shared_classes(student, BertForDenoising(larger))
        same = BertForDenoising(type(config)(**config.to_dict()))
        same.config.num_labels = 7  # language models have no labels to compare
        assert shared_classes(student, same) is None
    finally:
        ITEMS.pop("ForDenoising", None)
        VOCABULARY_HEADS.discard("ForDenoising")


def test_predictions_are_the_largest_logits_of_items_with_a_label() -> None:
    logits = np.array([[[0, 2, 1], [5, 0, 0]], [[0, 0, 3], [9, 9, 9]]], dtype=float)
    labels = np.array([[1, 0], [0, -100]])
    predictions, references = KINDS["masked_lm"].predictions(logits, labels)
    assert (predictions.tolist(), references.tolist()) == ([1, 0, 2], [1, 0, 0])
    predictions, references = KINDS["classification"].predictions(logits[:, 0], [1, 0])
    assert (predictions.tolist(), references.tolist()) == ([1, 2], [1, 0])
    predictions, _ = KINDS["regression"].predictions(np.array([[0.5], [-1.5]]), np.array([1.0, 2.0]))
    assert predictions.tolist() == [0.5, -1.5]


def test_default_metrics_compare_what_the_kind_predicts() -> None:
    for task in GLUE.values():
        assert all(METRICS[name].inputs == task.kind.metric_inputs for name in task.metrics)
        assert METRICS[task.main_metric].higher_is_better == task.higher_is_better


GIVEN = {
    "columns": {"text": "x"},
    "join_rows": True,
    "packing": True,
    "chat": True,
    "chat_template_kwargs": {"enable_thinking": False},
}


@pytest.mark.parametrize("task", ["sst2", "embedded", "classification", "text", "prompts"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_that_a_task_does_not_take_is_refused_with_the_tasks_that_do(task: str, name: str) -> None:
    taken = {
        "columns": "classification, regression, text, prompts",
        "join_rows": "text",
        "packing": "prompts",
        "chat": "prompts",
        "chat_template_kwargs": "prompts",
    }[name]
    if task in taken.split(", "):
        return
    with pytest.raises(InputError) as caught:
        read_task(DataSpec(task, "missing", **{name: GIVEN[name]}))
    assert caught.value.field == f"data.{name}"
    assert caught.value.fix == f"leave it out: {task} does not use it (only {taken})"


def test_a_spec_says_all_that_the_recipe_says_of_data_with_the_same_defaults() -> None:
    own = {each.name: each.default for each in fields(DataSpec)}
    for name, field in DataSection.model_fields.items():
        if name not in ("task", "augment", "synthetic", "test"):  # what is made is no matter of how rows are read
            assert (own[name] or None) == (field.default or None), name


def test_several_labels_of_an_example_are_refused_at_the_door(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_llm.data.kinds.base.KINDS", dict(KINDS))
    given = KINDS["classification"]
    several = type("Several", (type(given),), {"name": "several", "problem_type": "multi_label_classification"})
    with pytest.raises(
        InputError, match="^problem_type: got 'multi_label.*: regression or single_label_classification"
    ):
        register(several)

    class Lists(type(given)):
        def load(self, spec, config, training):
            task, splits = super().load(spec, config, training)
            one_hot = [[float(name == label) for name in range(2)] for label in splits["test"]["labels"]]
            return task, {**splits, "test": splits["test"].remove_columns("labels").add_column("labels", one_hot)}

    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(20)))
    spec = DataSpec("classification", str(tmp_path / "rows.csv"))
    read_task(spec)
    monkeypatch.setitem(KINDS, "classification", Lists())
    with pytest.raises(
        InputError, match=r"^data.columns.label: got \[[01].0, [01].0\]; give each example one class or"
    ):
        read_task(spec)
