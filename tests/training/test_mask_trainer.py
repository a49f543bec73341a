"""Masks that learn in the trainer: what they find, how they are stepped, how they are resumed, what is refused."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.models import tiny_model
from builders.pruning import layer_params
from builders.trainers import NO_DROPOUT, TERMS, rows, trainer_of, with_lora
from transformers import TrainerCallback

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.learning.masks import OPEN, MaskBudget, learned_masks
from distill_llm.pruning.plan import full_plan
from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.training import mask_trainer
from distill_llm.training.config import DistillationConfig
from distill_llm.training.mask_trainer import MASKS_NAME, MaskTrainer

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "learned_masks.md"
HEADS, NEURONS = ((0, (1,)), (1, (0, 3))), ((0, (5, 9, 31)), (1, (2, 40)))


def masks_of(model, by="l0", keep=0.5, units=("heads", "neurons"), warm_up=0.5):
    fine = [unit for unit in units if unit in ("heads", "neurons")]
    blocks = [unit for unit in units if unit not in fine]
    return learned_masks(model, by, MaskBudget(keep, unit_costs(model), PlanningRules(fine), warm_up, blocks))


def trainer_with(monkeypatch, folder, student, teacher, data, losses, masks, rate=None, **settings):
    def make(**given):
        return MaskTrainer(masks=masks, mask_learning_rate=rate, **given)

    with monkeypatch.context() as patch:
        patch.setattr("builders.trainers.DistillationTrainer", make)
        return trainer_of(folder, student, teacher, data, losses, **settings)


def partly_used():
    """A model of two layers in which all but a few heads and neurons write nothing."""
    model = tiny_model(layers=2, hidden=32, intermediate=48, **NO_DROPOUT)
    with torch.no_grad():
        for (index, heads), (_, neurons) in zip(HEADS, NEURONS, strict=True):
            layer = model.bert.encoder.layer[index]
            useless = [j for j in range(4) if j not in heads]
            layer.attention.output.dense.weight.view(32, 4, 8)[:, useless] = 0
            layer.attention.output.dense.weight.mul_(6)
            unused = [j for j in range(48) if j not in neurons]
            layer.output.dense.weight[:, unused] = 0
            layer.output.dense.weight.mul_(6)
    return model


def units_of(plan):
    heads = tuple((row.source, tuple(row.heads)) for row in plan.layers)
    return heads, tuple((row.source, tuple(row.neurons)) for row in plan.layers)


@pytest.mark.parametrize("by", ["l0", pytest.param("movement", marks=pytest.mark.slow)])
def test_masks_find_the_heads_and_neurons_that_the_model_uses(tmp_path, monkeypatch, by):
    student, teacher = partly_used(), partly_used()
    wanted = sum(len(heads) for _, heads in HEADS), sum(len(neurons) for _, neurons in NEURONS)
    costs, has = unit_costs(student), {"heads": 4, "neurons": 48, "queries": 4}
    whole = costs.of([has, has])
    left = whole - costs.of([{"heads": wanted[0], "neurons": wanted[1], "queries": wanted[0]}, dict.fromkeys(has, 0)])
    masks = masks_of(student, by, keep=1 - left / whole + 1e-4)
    data = rows(teacher, count=64)
    for row in data:
        row["labels"] = teacher(**{k: v[None] for k, v in row.items() if k != "labels"}).logits.argmax()
    losses = {"logits": {}, "hidden": {"layers": "uniform"}, **({"labels": {}} if by == "l0" else {})}
    trainer = trainer_with(
        monkeypatch,
        tmp_path,
        student,
        teacher,
        data,
        losses,
        masks,
        max_steps=120,
        learning_rate=0.0,
        per_device_train_batch_size=8,
        logging_steps=20,
    )
    trainer.train()
    plan = masks.harden(student)
    assert units_of(plan) == (HEADS, NEURONS)
    logged = [entry for entry in trainer.state.log_history if "masks/share" in entry]
    assert len(logged) == 6 and logged[-1]["masks/target"] == pytest.approx(masks.budget.keep)
    if by == "l0":
        assert logged[-1]["masks/share"] == pytest.approx(masks.budget.keep, abs=0.03)
        assert masks.told()["removed_open"] == 0
    else:
        assert logged[-1]["masks/share"] <= masks.budget.keep


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_penalty_counts_once_a_step(tmp_path, monkeypatch, accumulated):
    student, teacher = tiny_model(**NO_DROPOUT), tiny_model(seed=1, **NO_DROPOUT)
    masks = masks_of(student, keep=0.3)
    settings = {"optim": "sgd", "per_device_train_batch_size": 8 // accumulated, "learning_rate": 0.0}
    settings |= {"gradient_accumulation_steps": accumulated, "max_steps": 2, "lr_scheduler_type": "constant"}
    seen = []
    data = rows(teacher)
    trainer = trainer_with(monkeypatch, tmp_path, student, teacher, data, {"logits": {}}, masks, rate=0.5, **settings)
    step = MaskTrainer.get_batch_samples
    monkeypatch.setattr(
        MaskTrainer,
        "get_batch_samples",
        lambda self, *args: (seen.append(masks.units_log_alpha.detach().clone()), step(self, *args))[1],
    )
    trainer.train()
    expected = [0.0, 0.0]
    for log_alpha, target in zip(seen, (1.0, 0.3), strict=True):
        chance = 1 / (1 + np.exp(-log_alpha.double().numpy() - 2 / 3 * np.log(11)))
        gap = masks.units.rest + (chance * masks.units.costs.numpy()).sum() - target
        expected = [expected[0] + 0.5 * gap, expected[1] + 0.5 * gap**2]
    assert torch.all(seen[0] == OPEN)
    assert masks.multipliers.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_rate_of_the_masks_is_their_own_and_weight_decay_leaves_them_alone(tmp_path, monkeypatch):
    student, teacher = tiny_model(layers=2), tiny_model(layers=2, seed=1)
    masks = masks_of(student, "movement")
    trainer = trainer_with(
        monkeypatch, tmp_path, student, teacher, rows(teacher), {"logits": {}}, masks, weight_decay=0.1, max_steps=2
    )
    before, seen = copy.deepcopy(student.state_dict()), []

    class Watching(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append([optimizer.param_groups[place]["lr"] for place in (0, -1)])

        def on_optimizer_step(self, args, state, control, **kwargs):
            seen[-1].append(masks.scores.abs().max().item())

    trainer.add_callback(Watching())
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert group["weight_decay"] == 0 and len(group["params"]) == 1
    assert [rates[:2] for rates in seen] == [[1e-2, 0.01], [5e-3, 0.01]]  # the student's falls
    assert not torch.equal(masks.scores, torch.zeros_like(masks.scores))
    assert not torch.equal(before["classifier.weight"], student.classifier.weight)
    assert set(student.state_dict()) == set(before)
    # Only the sign of a gradient counts in AdamW's first step: scores have moved by the rate.
    assert seen[0][2] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("by", ["l0", pytest.param("movement", marks=pytest.mark.slow)])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, monkeypatch, by):
    teacher, data = tiny_model(layers=2), rows(tiny_model(), count=20)
    assert teacher.config.hidden_dropout_prob > 0
    units = ("heads", "neurons", "attention", "ffn") if by == "l0" else ("heads", "neurons")
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 10}
    settings |= {"save_strategy": "steps", "save_steps": 6, "activation_checkpointing": by == "l0"}
    found = []
    for name, checkpoint in (("run", None), ("again", tmp_path / "run" / "checkpoint-6")):
        student = prune(teacher, full_plan(teacher))
        masks = masks_of(student, by, units=units)
        torch.manual_seed(99)
        trainer = trainer_with(monkeypatch, tmp_path / name, student, teacher, data, TERMS["all"], masks, **settings)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        found.append({**student.state_dict(), **masks.state_dict()})
    assert (tmp_path / "run" / "checkpoint-6" / MASKS_NAME).is_file()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    moved = found[0]["scores" if by == "movement" else "units_log_alpha"]
    assert len(moved.unique()) > 20
    (tmp_path / "run" / "checkpoint-6" / MASKS_NAME).unlink()
    with pytest.raises(InputError, match=f"{MASKS_NAME} is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))


def test_activation_checkpointing_gives_the_gradients_of_none(tmp_path, monkeypatch):
    teacher, found = tiny_model(layers=2, seed=1), []
    for checkpointing in (False, True):
        student = tiny_model(layers=2)
        masks = masks_of(student)
        trainer_with(
            monkeypatch,
            tmp_path,
            student,
            teacher,
            rows(teacher),
            {"logits": {}},
            masks,
            optim="sgd",
            activation_checkpointing=checkpointing,
        ).train()
        found.append({**student.state_dict(), **masks.state_dict()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], msg=name)
    assert not torch.all(found[0]["units_log_alpha"] == OPEN)


def test_what_masks_do_not_go_with_is_refused(tmp_path, monkeypatch):
    student, teacher = tiny_model(), tiny_model(seed=1)
    masks, data = masks_of(student), rows(teacher)
    given = (monkeypatch, tmp_path, student, teacher, data, {"logits": {}}, masks)
    best = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    with pytest.raises(InputError, match="load_best_model_at_end: got True; set it to false while masks learn"):
        trainer_with(*given, **best)
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(InputError, match="use_reentrant: got True; set it to false"):
        trainer_with(*given, **reentrant)
    with monkeypatch.context() as patch:
        patch.setattr(mask_trainer, "sharding_of", lambda trainer: "FSDP2")
        with pytest.raises(InputError, match="masks: got 'a student sharded by FSDP2'; use DDP"):
            trainer_with(*given)
    with pytest.raises(InputError, match="give a model without adapters"):
        trainer_with(monkeypatch, tmp_path, with_lora(student), teacher, data, {"logits": {}}, masks)


def test_the_example_of_the_page_cuts_a_student_to_the_budget(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    student, teacher = tiny_model(layers=2), tiny_model(layers=2, seed=1)
    whole = layer_params(student)
    args = DistillationConfig(output_dir=str(tmp_path), losses={"logits": {}}, max_steps=2, report_to=[], use_cpu=True)
    names = {"student": student, "teacher": teacher, "rows": rows(teacher), "args": args}
    exec(code, names)
    assert 0.49 < layer_params(names["smaller"]) / whole <= 0.5 and names["plan"] == names["masks"].plan
    with pytest.raises(InputError, match="masks: got 'masks that are hardened'"):
        MaskTrainer(
            model=student, teacher=teacher, masks=names["masks"], args=args, train_dataset=names["rows"]
        ).train()
