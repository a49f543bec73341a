"""Processes that wait for another one wait for a day, whatever brings them together."""

import importlib.util
from datetime import timedelta

import pytest
import torch
from accelerate.state import AcceleratorState
from builders.causal import causal_model, word_tokenizer
from builders.recipes import recipe_for, recipe_with, write_model, write_rows

from distill_llm.checks.recipe import open_recipe
from distill_llm.data import DataSpec
from distill_llm.models.gguf import plain_checkpoint
from distill_llm.pipeline.caching import cache_teacher
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.folder import RunFolder
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.responses.respond import respond

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}


class Begun(BaseException):
    """In the place of a process group."""


@pytest.fixture
def begun(monkeypatch):
    """What a process group is begun with, in the second of two processes."""
    found = {}

    def begin(**given):
        found.update(given)
        raise Begun

    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield found
    AcceleratorState._reset_state(reset_partial_state=True)


def gguf_teacher(folder):
    (folder / "model.gguf").write_bytes(b"a model")
    plain_checkpoint(folder / "model.gguf")


def pruned_recipe(folder):
    Context(open_recipe(parse_recipe(recipe_for(folder, distillation=None))))


def own_cache(folder):
    data = DataSpec(**recipe_for(folder)["data"])
    cache_teacher(str(folder / "teacher"), data, folder / "cache")


def own_responses(folder):
    for part in (causal_model(), word_tokenizer()):
        part.save_pretrained(folder / "decoder")
    respond(str(folder / "decoder"), ["w1 w2"], folder / "answers")


@pytest.mark.parametrize(
    "work",
    [
        lambda folder: open_recipe(recipe_with(folder)),
        lambda folder: open_recipe(recipe_with(folder, teacher__train={"num_train_epochs": 1})),
        lambda folder: RunFolder(folder / "run", "seed: 0\n"),
        pruned_recipe,
        own_cache,
        own_responses,
        pytest.param(
            gguf_teacher, marks=pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not there")
        ),
    ],
    ids=["recipe", "trained teacher", "run folder", "pruned recipe", "cache", "responses", "gguf"],
)
def test_whatever_comes_first_begins_a_group_that_waits_for_a_day(tmp_path, begun, work):
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    with pytest.raises(Begun):
        work(tmp_path)
    assert begun["timeout"] == timedelta(days=1)
    assert torch.accelerator.is_available() or (begun["backend"], begun["world_size"]) == ("gloo", 2)


def test_the_limit_of_a_recipe_that_has_one_holds_on_the_cpu_too(tmp_path, begun):
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    with pytest.raises(Begun):
        open_recipe(recipe_with(tmp_path, distillation__ddp_timeout=100, distillation__use_cpu=True))
    assert begun["timeout"] == timedelta(seconds=100) and begun["backend"] == "gloo"
