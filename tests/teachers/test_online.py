"""A teacher in memory: in which precision it is held, and how often."""

import copy

import pytest
import torch
from builders.causal import causal_model, word_tokenizer
from builders.models import tiny_model

from distill_llm.checks.recipe import Opened
from distill_llm.models.checkpoint import converted, load_pretrained
from distill_llm.models.finding import open_model
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.teaching import loader
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.teachers import OnlineTeacher

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_copy_is_the_model_as_it_is_loaded_in_that_precision(tmp_path, tied):
    model = causal_model(tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    made = converted(model, torch.bfloat16, CPU)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, dtype=torch.bfloat16)
    for kind in ("named_parameters", "named_buffers"):
        own, other = (dict(getattr(each, kind)()) for each in (made, loaded))
        assert own.keys() == other.keys()
        assert all(tensor.dtype == own[name].dtype and torch.equal(tensor, own[name]) for name, tensor in other.items())
    assert (made.lm_head.weight is made.get_input_embeddings().weight) == tied
    assert model.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = torch.arange(10)[None]
    assert torch.equal(made(ids).logits, loaded.eval()(ids).logits)


def test_a_teacher_in_the_wanted_precision_is_not_copied():
    model = tiny_model().to(torch.bfloat16)
    for dtype in (torch.bfloat16, None, torch.float32):
        teacher = OnlineTeacher(model)
        teacher.place(CPU, dtype)
        assert (teacher.model is model) == (dtype != torch.float32)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "training", "wanted"),
    [
        (None, {}, torch.float32),
        (None, {"bf16": True}, torch.bfloat16),
        ("float32", {"bf16": True}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
    ],
)
def test_a_recipes_teacher_is_loaded_in_the_precision_that_it_is_held_in(tmp_path, given, training, wanted):
    for part in (causal_model(), word_tokenizer()):
        part.save_pretrained(tmp_path / "teacher")
    recipe = parse_recipe(
        {
            "teacher": {"model": str(tmp_path / "teacher"), "dtype": given},
            "data": {"task": "text", "path": "text.txt"},
            "pruning": {"keep": 0.5},
            "distillation": {"losses": {"logits": {}}, **training},
            "output_dir": str(tmp_path / "run"),
        }
    )
    opened = Opened(recipe, open_model("teacher.model", recipe.teacher.model), None, None)
    assert loader(Context(opened), "final")(tmp_path / "teacher", False).dtype == wanted
