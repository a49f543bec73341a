"""Runs whose student has another tokenizer than the teacher."""

import json
import re
from pathlib import Path

import pytest
import yaml
from builders.causal import causal_model
from builders.recipes import faults_at_the_door, recipe_with
from builders.runs import weights
from builders.tokenizers import bytes_tokenizer, llama_tokenizer

import distill_llm
from distill_llm.checks.estimate import unknown_costs
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.recipe.recipe import parse_recipe

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "cross_tokenizer.md"
TEXTS = ["yes bc 4 yes", "a=4. yes bc", "yes yes abc", "bc bc yes: abc", "yes yes 4", "4 4 yes bc"]

pytestmark = pytest.mark.slow


def write(folder, tokenizer, seed=0, **config):
    size = max(tokenizer.get_vocab().values()) + 1
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    causal_model(vocab_size=size, **ids, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "teacher", bytes_tokenizer())
    write(tmp_path / "student", llama_tokenizer(), hidden_size=16, head_dim=4)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 8))
    pairs = [{"prompt": text, "response": f"{other}"} for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, pairs * 6)))
    return tmp_path


def recipe_of(folder, task="text", **changes):
    data = {"task": task, "path": str(folder / ("text.txt" if task == "text" else "prompts.jsonl")), "max_length": 24}
    losses = {"labels": {"weight": 0.5}, "cross_tokenizer": {}}
    training = {
        "losses": losses,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "learning_rate": 3e-3,
    }
    given = {"data": data, "pruning": None, "student__model": str(folder / "student"), "distillation": training}
    return recipe_with(folder, **{**given, "teacher__tokenizer": "own", "evaluation__batch_size": 8, **changes})


@pytest.mark.parametrize("task", ["text", "prompts"])
def test_a_run_teaches_through_text_and_scores_both_models_per_token_of_the_student(folder, task, capsys, caplog):
    losses = {"cross_tokenizer": {}}
    if task == "prompts":
        losses["responses"] = {"share": 0.5, "max_new_tokens": 4}
    changes = {"distillation__losses": losses}
    result = distill_llm.run(recipe_of(folder, task, **changes), folder / "run")
    load_pretrained(folder / "run" / "student")
    aligned = result.metrics["aligned"]
    assert 0 < aligned["exact_tokens"] < aligned["tokens"] and aligned["merged_tokens"] > 0
    assert any("are tokens of the teacher too" in record.message for record in caplog.records)
    assert "are tokens of the teacher too" in (folder / "run" / "report.md").read_text()
    assert "loss/cross_tokenizer" in next(iter(result.metrics["history"].values()))["losses"]
    teacher = result.metrics["teacher"]["metrics"]
    assert teacher["score"] == pytest.approx(teacher["perplexity"])

    # The teacher's loss by itself: the whole text in its own tokens, over the student's number of tokens.
    from distill_llm.data import DataSpec, collator, encode, load_task
    from distill_llm.evaluation.evaluate import evaluate_model

    recipe = recipe_of(folder, task)
    spec = DataSpec(task, recipe.data.path, max_length=24, seed=recipe.seed)
    sums = {}
    for name in ("teacher", "student"):
        tokenizer = (bytes_tokenizer if name == "teacher" else llama_tokenizer)()
        data = load_task(spec, causal_model().config)
        rows = encode(data, tokenizer, 24).test
        count = sum(sum(label != -100 for label in labels[1:]) for labels in rows["labels"])
        model = load_pretrained(folder / name)
        sums[name] = evaluate_model(model, rows, data.task, collator(data.task, tokenizer))["loss"] * count, count
    assert teacher["loss"] == pytest.approx(sums["teacher"][0] / sums["student"][1], rel=1e-4)


def test_a_stopped_run_goes_on_to_the_same_student(folder, monkeypatch):
    from distill_llm.training.trainer import DistillationTrainer

    changes = {"distillation__save_steps": 3, "distillation__losses": {"cross_tokenizer": {}}}
    distill_llm.run(recipe_of(folder, **changes), folder / "whole")
    before, steps = DistillationTrainer.compute_loss, []

    def stopping(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return before(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationTrainer, "compute_loss", stopping)
        distill_llm.run(recipe_of(folder, **changes), folder / "stopped")
    distill_llm.run(recipe_of(folder, **changes), folder / "stopped")
    whole, stopped = (weights(folder / name / "student") for name in ("whole", "stopped"))
    assert all((stopped[name] == tensor).all() for name, tensor in whole.items())


def test_the_door_names_the_option_and_what_it_does_not_go_with(folder):
    def lines(**changes):
        return " ".join(faults_at_the_door(recipe_of(folder, **changes)))

    plain = {"teacher__tokenizer": None, "distillation__losses": {"logits": {}}}
    assert "or teacher.tokenizer: own with the loss cross_tokenizer" in lines(**plain)
    assert not lines()
    both = {"distillation__losses": {"cross_tokenizer": {}, "logits": {}, "hidden": {}}}
    assert re.search(r"distillation.losses.logits: .*linked.*distillation.losses.hidden: ", lines(**both))
    assert unknown_costs(recipe_of(folder))

    own, other = llama_tokenizer(), bytes_tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False)
    template = "{{% for m in messages %}}{{{{ '{}' + m['content'] + '</s>' }}}}{{% endfor %}}"
    template += "{{% if add_generation_prompt %}}{{{{ '{}' }}}}{{% endif %}}"
    own.chat_template, other.chat_template = (template.format(mark, mark) for mark in ("<|im_start|>", "<|user|>"))
    write(folder / "student", own, hidden_size=16, head_dim=4)
    write(folder / "teacher", other)
    data = {"task": "prompts", "path": str(folder / "prompts.jsonl"), "max_length": 40, "chat": True}
    assert re.search(r"teacher.tokenizer: .*use rows without <\|im_start\|>", lines(data=data))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"distillation__losses": {"labels": {}}}, "teacher.tokenizer: .*add the loss cross_tokenizer"),
        ({"teacher__tokenizer": None}, "distillation.losses.cross_tokenizer: .*add teacher.tokenizer: own"),
        ({"teacher__cache": "somewhere"}, "teacher.tokenizer: .*remove teacher.cache"),
        ({"teacher__train": {"max_steps": 1}}, "teacher.tokenizer: .*remove teacher.train"),
        ({"pruning": {"keep": 0.5}, "student": None}, "teacher.tokenizer: .*remove pruning"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(folder, changes, line):
    with pytest.raises(Exception, match=line):
        recipe_of(folder, **changes)


def test_the_recipe_of_the_page_is_read():
    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    assert parse_recipe(given).teacher.tokenizer == "own"
