"""Runs of language models with exits: from a recipe to drafts and their report, the same bits after a stop; and the door."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from builders.recipes import causal_recipe, faults_at_the_door, write_decoder
from builders.runs import same, weights
from transformers import AutoModelForCausalLM, GenerationConfig

import distill_llm
from distill_llm.pipeline import exit_drafts
from distill_llm.pipeline.stages import recover
from distill_llm.recipe.recipe import parse_recipe

TRAINING = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "use_cpu": True, "save_steps": 2}
CHANGES = {
    "exits": [1, 3],
    "distillation": {"losses": {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}, **TRAINING},
    "report": {"latency_grid": False, "examples": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "prompts"])
def test_a_recipe_gives_a_student_that_drafts_and_a_stopped_run_ends_with_the_same_bits(tmp_path, monkeypatch, task):
    write_decoder(tmp_path / "teacher", num_hidden_layers=4)
    more = {} if task == "text" else {"evaluation__max_new_tokens": 4}
    recipe = causal_recipe(tmp_path, task, **CHANGES, **more)
    result = distill_llm.run(recipe, tmp_path / "run")
    found, whole = result.metrics["exits"], result.metrics["student"]
    assert (found["after"], found["layers"], found["draft"] in (None, 1, 3)) == ([1, 3], 4, True)
    assert found["whole"]["perplexity"] == pytest.approx(whole["score"], rel=1e-3)
    assert found["whole"]["agreement"] == 1 and found["texts"] >= 1
    for row in found["exits"]:
        assert row["perplexity"] > 0 and 0 <= row["agreement"] <= 1 and 0 <= row["accepted"] <= 1
        assert row["tokens_per_second"] > 0 and row["same"] == found["texts"]
        assert (row["speedup_error"] is None) == (found["texts"] == 1)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert student.config.exits == {"after": [1, 3], "draft": found["draft"]}
    assert not list((tmp_path / "run" / "student").glob("*.py"))
    ids = torch.tensor([[5, 6, 7]])
    drafted, plain = (
        student.generate(ids, do_sample=False, max_new_tokens=12, assistant_early_exit=e) for e in (1, None)
    )
    assert torch.equal(drafted, plain)
    assert "loss/exits" in result.metrics["history"]["round-1/recover"]["losses"]
    for text in ((tmp_path / "run" / "report.md").read_text(), (tmp_path / "run" / "report.html").read_text()):
        assert "Early exits" in text and "drafts accepted" in text and "4 (all)" in text
    assert (tmp_path / "run" / "figures" / "exits.png").stat().st_size > 1000
    assert "stock transformers model" in (tmp_path / "run" / "student" / "README.md").read_text()

    stopped, train = tmp_path / "stopped", recover.train_model

    def stops(run, model, *rest):
        saves = type(model).save_pretrained

        def save_and_stop(self, *args, **kwargs):
            saves(self, *args, **kwargs)
            if len(list(stopped.glob("round-1/student-training/checkpoint-*"))) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(type(model), "save_pretrained", save_and_stop)
        return train(run, model, *rest)

    monkeypatch.setattr(recover, "train_model", stops)
    with pytest.raises(KeyboardInterrupt):
        distill_llm.run(recipe, stopped)
    monkeypatch.undo()
    assert list(stopped.glob("round-1/student-training/checkpoint-*"))
    distill_llm.run(recipe, stopped)
    assert same(weights(tmp_path / "run" / "student"), weights(stopped / "student"))


@pytest.mark.slow
def test_a_pruned_student_has_exits_too_and_a_cache_that_drafts_can_use(tmp_path, monkeypatch):
    write_decoder(tmp_path / "teacher", num_hidden_layers=4)
    settings = GenerationConfig.from_pretrained(tmp_path / "teacher")
    settings.cache_implementation = "static"
    settings.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(exit_drafts, "fastest", lambda made: 1)
    changes = {**CHANGES, "student__model": None, "student": None, "pruning": {"keep": 0.6, "calibration_examples": 4}}
    changes.pop("student__model")
    recipe = causal_recipe(tmp_path, **changes)
    result = distill_llm.run(recipe, tmp_path / "run")
    assert [row["layers"] for row in result.metrics["exits"]["exits"]] == [1, 3]
    assert all(row["same"] == result.metrics["exits"]["texts"] for row in result.metrics["exits"]["exits"])
    student = distill_llm.load_pretrained(tmp_path / "run" / "student")
    assert student.config.exits == {"after": [1, 3], "draft": 1} and "Pruned" in type(student).__name__
    assert student.generation_config.cache_implementation is None
    ids = torch.tensor([[5, 6, 7]])
    assert student.generate(ids, do_sample=False, max_new_tokens=4, assistant_early_exit=1).shape[1] > 3


@pytest.mark.slow
def test_the_door_refuses_what_exits_of_language_models_do_not_go_with_in_one_line_each(tmp_path):
    write_decoder(tmp_path / "teacher", num_hidden_layers=4)
    assert faults_at_the_door(causal_recipe(tmp_path, **CHANGES)) == []
    cases = [
        (
            {"exits": {"after": [1], "threshold": 0.9}},
            "exits.threshold: got 0.9; leave it out: a language model has no",
        ),
        ({"exits": {"after": [1], "within": 0.5}}, "exits.within: got 0.5; leave it out: a language model has no"),
        ({"exits": [4]}, "exits.after: got [4]; accepted: numbers of layers from 1 to 3"),
    ]
    for changes, message in cases:
        (fault,) = faults_at_the_door(causal_recipe(tmp_path, **{**CHANGES, **changes}))
        assert fault.startswith(message) and len(fault) <= 300, fault
    write_decoder(tmp_path / "teacher", "gpt_neox", num_hidden_layers=4)
    (fault,) = faults_at_the_door(causal_recipe(tmp_path, **CHANGES))
    assert fault.startswith("exits: got 'GPTNeoXForCausalLM'; accepted: a ...ForCausalLM model of llama"), fault


def test_the_recipe_of_the_page_is_read():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "exits.md").read_text()
    recipe = parse_recipe(yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[2]))
    assert recipe.exits.after == [8, 16] and recipe.data.task == "text"
