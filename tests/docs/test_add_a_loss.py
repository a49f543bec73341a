"""docs/development/add-a-loss.md: its code is run, and what it adds is trained with; nothing else is edited for it."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders.recipes import recipe_for
from builders.trainers import (
    assert_same_step,
    both_ways,
    cached,
    causal_model,
    model_of,
    rows,
    step_gradient,
    trainer_of,
)

from distill_llm.common.errors import InputError
from distill_llm.losses import distances, divergences
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.terms import term as terms
from distill_llm.recipe.recipe import parse_recipe

TEXT = (Path(__file__).parents[2] / "docs" / "development" / "add-a-loss.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
LOSSES = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])["losses"]
REGISTRIES = (terms.TERMS, divergences.DIVERGENCES, distances.STATE_DISTANCES, distances.MAP_DISTANCES)


@pytest.fixture(autouse=True)
def the_page(tmp_path, monkeypatch):
    """The code of the page in modules outside of the package, imported; what they register is gone after a test."""
    terms.all_terms()
    known = [dict(registry) for registry in REGISTRIES]
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, block in enumerate(BLOCKS):
        (tmp_path / f"losses_of_the_page_{number}.py").write_text(block)
        importlib.invalidate_caches()
        importlib.import_module(f"losses_of_the_page_{number}")
        del sys.modules[f"losses_of_the_page_{number}"]
    yield
    for registry, before in zip(REGISTRIES, known, strict=True):
        registry.clear()
        registry.update(before)


def logits_of_items(student, teacher, data, causal):
    """Logits of both models at the outputs that count, in fp64."""
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        both = [model.eval()(**batch).logits.double() for model in (student, teacher)]
    return [each[:, :-1][labels[:, 1:] != -100] for each in both] if causal else both


def huber(student, teacher, delta):
    """The mean over items of the mean over classes, number by number."""
    values = []
    for pair in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        apart = abs(pair[0] - pair[1])
        values.append(apart**2 / 2 if apart <= delta else delta * (apart - delta / 2))
    return sum(values) / len(values)


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm", "causal-lm"])
def test_the_term_of_the_page_is_trained_with_and_logged_under_its_name(tmp_path, monkeypatch, head):
    teacher, student = model_of(head, layers=3), model_of(head, layers=2, seed=1)
    data = rows(student)
    found = both_ways(monkeypatch, tmp_path, student, teacher, data, LOSSES)
    assert_same_step(found)  # in the chunked head and with whole logits
    if head == "masked-lm":
        data = [{**row, "labels": torch.zeros_like(row["labels"])} for row in data]  # every valid token counts
    both = logits_of_items(student, teacher, data, head == "causal-lm")
    if head == "masked-lm":
        valid = torch.stack([row["attention_mask"] for row in data]).bool()
        both = [each[valid] for each in both]
    expected = huber(*both, delta=2.0)
    for gradient, log in found:
        assert log["loss/huber"] == pytest.approx(expected, rel=1e-4)
        assert log["loss"] == pytest.approx(0.5 * expected, rel=1e-4)
        assert any(each.abs().sum() > 0 for each in gradient.values())


def test_a_student_learns_from_the_term(tmp_path):
    teacher, student = causal_model(), causal_model(layers=2, seed=1)
    trainer = trainer_of(tmp_path, student, teacher, rows(student), LOSSES, max_steps=12)
    trainer.train()
    losses = [log["loss/huber"] for log in trainer.state.log_history if "loss/huber" in log]
    assert losses[-1] < 0.8 * losses[0]


def test_whole_logits_are_never_held_for_the_term_but_a_cache_of_a_few_tokens_is_refused(tmp_path):
    teacher, student = causal_model(), causal_model(layers=2, seed=1)
    data = rows(student)
    trainer = trainer_of(tmp_path, student, teacher, data, LOSSES)
    assert trainer.loss.head_terms is not None and not trainer.terms.needs_logits
    few = cached(tmp_path / "few", teacher, data, k=5)
    with pytest.raises(InputError, match=r"losses.huber: got 'a cache of 5 of 100 classes'; accepted: .*all classes"):
        trainer_of(tmp_path, student, few, data, LOSSES)
    classifier, pupil = model_of("sequence-classification", 3), model_of("sequence-classification", 2, seed=1)
    data = rows(pupil)
    whole = cached(tmp_path / "whole", classifier, data)
    logs = [step_gradient(tmp_path, pupil, each, data, LOSSES)[1]["loss/huber"] for each in (classifier, whole)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_a_recipe_takes_the_term_and_its_yaml_is_read_again(tmp_path):
    recipe = parse_recipe(recipe_for(tmp_path, distillation={"losses": {**LOSSES, "labels": {}}}))
    assert recipe.distillation.losses.huber.delta == 2.0
    assert list(recipe.distillation.losses.terms()) == ["labels", "huber"]
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    with pytest.raises(InputError, match="losses.huber.delat: .*'delta' .the nearest."):
        parse_objective({"huber": {"delat": 1}})
    with pytest.raises(InputError, match="losses.hubert: .*'huber' .the nearest."):
        parse_objective({"hubert": {}})
    with pytest.raises(InputError, match="losses.huber.delta: got 0; accepted: a number above 0"):
        parse_objective({"huber": {"delta": 0}})


def test_the_term_of_layers_compares_mean_states_of_examples(tmp_path):
    teacher, student = model_of("sequence-classification", 4), model_of("sequence-classification", 2, seed=1)
    data = rows(student)
    _, log = step_gradient(tmp_path, student, teacher, data, {"pooled": {"layers": "uniform"}})
    total = 0.0
    for row in data:
        valid = row["attention_mask"].bool()
        batch = {name: row[name][None] for name in ("input_ids", "attention_mask")}
        states = [model.eval()(**batch, output_hidden_states=True).hidden_states for model in (student, teacher)]
        for own, source in ((1, 2), (2, 4)):
            a, b = (each[layer][0, valid].double().mean(0) for each, layer in zip(states, (own, source), strict=True))
            total += (1 - (a @ b) / a.norm() / b.norm()).item() / 2
    assert log["loss/pooled"] == pytest.approx(total / len(data), rel=1e-4)


def test_what_the_term_of_layers_says_of_itself_is_heeded(tmp_path):
    teacher, narrow = causal_model(layers=4), causal_model(layers=2, seed=1, hidden_size=24)
    found, _ = step_gradient(tmp_path, narrow, teacher, rows(teacher), {"pooled": {}})
    assert found["projection 1-3.weight"].shape == (32, 24) and found["projection 1-3.weight"].abs().sum() > 0
    with pytest.raises(InputError, match="losses.pooled.layers: .*not pruned from this teacher"):
        trainer_of(tmp_path, narrow, teacher, [], {"pooled": {"layers": "lineage"}})
    with pytest.raises(InputError, match="losses.pooled: got 'a cached teacher'"):
        trainer_of(tmp_path, narrow, cached(tmp_path / "c", teacher, rows(teacher)), [], {"pooled": {}})
    packed = [{**row, "position_ids": torch.arange(10) % 5} for row in rows(teacher)]
    with pytest.raises(
        InputError,
        match=r"^losses.pooled: got 'rows of several sequences \(train_dataset\)'; accepted: rows of one sequence",
    ):
        trainer_of(tmp_path, narrow, teacher, packed, {"pooled": {}})  # before the first step
    (fault,) = parse_objective({"pooled": {}}).faults(terms.Use(packed="data.packing"), "distillation.losses")
    assert fault.field == "distillation.losses.pooled"


def test_distances_of_the_page_are_those_of_the_models_states_and_maps(tmp_path):
    teacher = model_of("sequence-classification", 2, attn_implementation="eager")
    student = model_of("sequence-classification", 2, seed=1, attn_implementation="eager")
    data = rows(student)
    losses = {"hidden": {"layers": "last", "distance": "l1"}, "attention": {"layers": "last", "distance": "tvd"}}
    _, log = step_gradient(tmp_path, student, teacher, data, losses)
    batch = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    own, target = (
        model.eval()(**batch, output_hidden_states=True, output_attentions=True) for model in (student, teacher)
    )
    valid = batch["attention_mask"].bool()
    apart = (own.hidden_states[-1] - target.hidden_states[-1]).abs().mean(-1)[valid].mean()
    maps = (own.attentions[-1] - target.attentions[-1]).abs().sum(-1).mean(1)[valid].mean() / 2
    assert log["loss/hidden"] == pytest.approx(apart.item(), rel=1e-5)
    assert log["loss/attention"] == pytest.approx(maps.item(), rel=1e-4)
    with pytest.raises(InputError, match="losses.hidden.distance: .*one of mse, cosine, normalized_mse, l1"):
        parse_objective({"hidden": {"distance": "l3x"}})
