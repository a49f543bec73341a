"""Runs that learn masks: the plan, the cut, the report, a stop in between, and what the door refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders.models import random_batch
from builders.processes import run_recipe
from builders.recipes import faults_at_the_door, recipe_for, recipe_with, write_decoder, write_model, write_recipe
from builders.runs import rows_of, same, weights, write_learnable_rows

import distill_llm
from distill_llm.checks.prune import open_pruning
from distill_llm.common.errors import InputError, faults_in
from distill_llm.models.masks import linears_of, masks_in
from distill_llm.pipeline.preview import masks_note, preview
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.weights.rules import SparsityRules
from distill_llm.pruning.weights.sparsify import sparsify
from distill_llm.recipe.cells import cells_of
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.training.mask_trainer import MaskTrainer

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "learned_masks.md"
TRAINING = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "use_cpu": True}
LOSSES = {"labels": {}, "logits": {}, "hidden": {}, "attention": {}}
TWO = ("--accelerate", "ddp", "--processes", "2")
BLOCKS = ["heads", "neurons", "attention", "ffn"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_model(folder / "teacher", max_position_embeddings=64)
    write_learnable_rows(folder / "rows.csv")
    return folder


def masked_recipe(inputs, units=BLOCKS, **masks):
    masks = {"train": {"max_steps": 8, "gradient_accumulation_steps": 2, "save_steps": 3}, **masks}
    return recipe_for(
        inputs,
        data=rows_of(inputs),
        pruning={"keep": 0.5, "units": units, "masks": masks},
        distillation={"losses": LOSSES, **TRAINING},
    )


@pytest.mark.slow
def test_masks_are_learnt_cut_reported_and_a_stopped_run_ends_with_the_same_bits(inputs, tmp_path, monkeypatch, capsys):
    given = masked_recipe(inputs)
    distill_llm.run(given, tmp_path / "run")
    folder, metrics = tmp_path / "run" / "round-1", json.loads((tmp_path / "run" / "metrics.json").read_text())
    told, (row,) = metrics["rounds"][0]["masks"], metrics["rounds"]
    assert set(row["seconds"]) == {"masks", "prune", "recover"} and row["score_compensated"] is None
    assert told["by"] == "l0" and told["target"] == 0.5 and 0.3 < told["share"] <= 1 and "lambda_1" in told
    assert 0.49 < metrics["layer_params_kept"] <= 0.5 and row["kept"] == pytest.approx(metrics["layer_params_kept"])
    assert "round-1/masks" in metrics["history"] and len(metrics["history"]["round-1/masks"]["losses"]) == 5
    report = (tmp_path / "run" / "report.md").read_text()
    assert "learnt by l0: " in report and "learnt by l0: " in (tmp_path / "run" / "report.html").read_text()
    assert "learnt by l0: " in re.sub(r"\s+", " ", capsys.readouterr().out)

    plan, scores = (
        PruningPlan.load(folder / "masks" / "plan.json"),
        Importance.load(folder / "masks" / "scores.safetensors"),
    )
    assert PruningPlan.load(folder / "plan.json") == plan and scores.criterion == "l0"
    whole, cut = (distill_llm.load_pretrained(folder / name).eval() for name in ("masks", "pruned"))
    batch = random_batch(whole)
    with torch.no_grad():
        torch.testing.assert_close(cut(**batch).logits, whole(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not (folder / "masks-training").exists()  # its checkpoints
    assert not same(weights(folder / "masks"), weights(inputs / "teacher"))

    step, left = MaskTrainer.training_step, [11]  # of 16 micro-batches

    def stopped(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MaskTrainer, "training_step", stopped)
        distill_llm.run(given, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "round-1" / "masks-training" / "checkpoint-3" / "learned_masks.pt").is_file()
    distill_llm.run(given, tmp_path / "stopped")
    for name in ("round-1/masks", "round-1/student", "student"):
        assert same(weights(tmp_path / "stopped" / name), weights(tmp_path / "run" / name))


@pytest.mark.slow
def test_movement_works_over_a_decoder_with_flops_and_generations_follow(tmp_path):
    write_decoder(tmp_path / "teacher")
    (tmp_path / "corpus.txt").write_text("the film is good and the story is bad\n\n" * 60)
    given = recipe_for(
        tmp_path,
        data={"task": "text", "path": str(tmp_path / "corpus.txt"), "max_length": 16},
        pruning={"keep": 0.6, "cost": "flops", "masks": {"by": "movement", "train": {"max_steps": 6}}},
        distillation={"losses": {"logits": {}}, "generations": {"count": 2}, **TRAINING},
    )
    distill_llm.run(given, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "threshold" in metrics["rounds"][0]["masks"]
    assert 0.58 < metrics["rounds"][0]["kept"] <= 0.6
    assert len(metrics["generations"]["students"]) == 2


@pytest.mark.slow
def test_two_processes_learn_the_masks_of_one_on_the_same_global_batch(tmp_path):
    write_model(
        tmp_path / "teacher", max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    write_learnable_rows(tmp_path / "rows" / "train.csv", rows=40)
    write_learnable_rows(tmp_path / "rows" / "test.csv", rows=8)
    given = masked_recipe(tmp_path, by="movement", units=["heads", "neurons"])
    given["data"]["path"] = str(tmp_path / "rows")
    given["distillation"] |= {"optim": "sgd", "learning_rate": 0.05}
    file = write_recipe(tmp_path, given)
    for name, options in (("one", ((),)), ("two", (TWO, "distillation.per_device_train_batch_size=2"))):
        run = run_recipe(file, tmp_path / name, *options)
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
    plans = [(tmp_path / name / "round-1" / "plan.json").read_text() for name in ("one", "two")]
    assert plans[0] == plans[1]
    one, two = (weights(tmp_path / name / "round-1" / "masks") for name in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.slow
def test_zeros_of_a_sparse_teacher_stay_while_masks_learn_through_the_cut_and_in_recovery(inputs, tmp_path):
    teacher = distill_llm.load_pretrained(inputs / "teacher")
    sparse, masks = sparsify(teacher, rules=SparsityRules(0.5, criterion="magnitude"))
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    sparse.save_pretrained(tmp_path / "teacher")
    masks.save(tmp_path / "teacher" / "masks.safetensors")
    given = masked_recipe(inputs, train={"max_steps": 2})
    given["teacher"]["model"], given["data"] = str(tmp_path / "teacher"), rows_of(inputs)
    distill_llm.run(given, tmp_path / "run")
    learnt = weights(tmp_path / "run" / "round-1" / "masks")
    assert any(not torch.equal(learnt[f"{name}.weight"], linear.weight) for name, linear in linears_of(sparse).items())
    for name, kept in masks.kept.items():
        assert not learnt[f"{name}.weight"][~kept].any(), name
    # What the plan keeps of the masks, by hand.
    plan = PruningPlan.load(tmp_path / "run" / "round-1" / "plan.json")
    whole, size = sum(kept.numel() for kept in masks.kept.values()), 8
    for folder in ("round-1/pruned", "round-1/student", "student"):
        found = weights(tmp_path / "run" / folder)
        for number, row in enumerate(plan.layers):
            heads = [head * size + i for head in row.heads for i in range(size)]
            of = {
                "attention.self.query": (heads, slice(None)),
                "attention.output.dense": (slice(None), heads),
                "intermediate.dense": (list(row.neurons), slice(None)),
                "output.dense": (slice(None), list(row.neurons)),
            }
            for path, (outputs, inputs_kept) in of.items():
                kept = masks.kept[f"bert.encoder.layer.{row.source}.{path}"][outputs][:, inputs_kept]
                weight = found[f"bert.encoder.layer.{number}.{path}.weight"]
                assert weight.shape == kept.shape and not weight[~kept].any(), (folder, path)
                assert not kept.numel() or weight[kept].any()
    own = masks_in(tmp_path / "run" / "student")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert own is not None and own.weights < whole and 0.4 < own.sparsity == metrics["sparsity"]["share"] < 0.6


@pytest.mark.parametrize(
    "pruning, line",
    [
        ({"masks": {"by": "l1"}}, "pruning.masks.by: got 'l1'; accepted: "),
        ({"masks": {"warm_up": 0}}, "pruning.masks.warm_up: got 0; accepted: "),
        ({"masks": {"warm_up": 1.5}}, "pruning.masks.warm_up: got 1.5; accepted: "),
        ({"masks": {"learning_rate": 0}}, "pruning.masks.learning_rate: got 0; accepted: "),
        ({"masks": {"steps": 5}}, "pruning.masks.steps: got 5; accepted: "),
        (
            {"masks": {"train": {"max_step": 5}}},
            "pruning.masks.train.max_step: got 5; accepted: 'max_steps' (the nearest)",
        ),
        ({"masks": {}, "keep": 1.0}, "pruning.keep: got 1.0; accepted: a number below 1"),
        (
            {"masks": {}, "rounds": 2},
            "pruning.rounds: got 2; leave it out: with masks the student is cut once; `masks.",
        ),
        ({"masks": {}, "cuts": 2}, "pruning.cuts: got 2; leave it out: with masks the student is cut once"),
        ({"masks": {}, "search": {}}, "pruning.search: got {"),
        ({"masks": {}, "criterion": "taylor"}, "pruning.criterion: got 'taylor'; leave it out: masks are learnt in a"),
        (
            {"masks": {}, "statistics": "x.safetensors"},
            "pruning.statistics: got 'x.safetensors'; leave it out: masks are learnt in a training, which ranks the units",
        ),
        (
            {"masks": {}, "calibration_examples": 8},
            "pruning.calibration_examples: got 8; leave it out: it says how many rows the calibration pass reads, and masks learn"
            " from the training rows without such a pass; only `weights` would need it",
        ),
        (
            {"masks": {}, "loss": "kl"},
            "pruning.loss: got 'kl'; leave it out: it is the loss whose gradients the calibration",
        ),
        ({"masks": {}, "precision": "auto"}, "pruning.precision: got 'auto'; leave it out: it is the precision of the"),
        (
            {"masks": {}, "calibration": [{}]},
            "leave it out: it says where the rows of the calibration pass come from, and masks",
        ),
        (
            {"masks": {}, "keep": None, "layers": [0]},
            "pruning.layers: got [0]; leave it out: masks are learnt for heads and neurons, down to the share in `keep`",
        ),
        (
            {"masks": {}, "units": ["layers"]},
            "pruning.units: got ['layers']; accepted: heads, neurons, attention and ffn",
        ),
        ({"masks": {}, "units": ["heads", "ffn"]}, "pruning.units: got ['heads', 'ffn']; add neurons: a block's gate"),
        (
            {"masks": {"by": "movement"}, "units": ["heads", "attention"]},
            "leave attention out: by movement a block goes",
        ),
        ({"masks": {}, "scope": "local"}, "pruning.scope: got 'local'; leave it out: masks compete over all layers"),
        ({"masks": {}, "uniform": True}, "pruning.uniform: got True; leave it out: masks compete"),
        ({"masks": {}, "cost": "latency"}, "pruning.cost: got 'latency'; choose params, flops or memory: masks need"),
        ({"masks": {}, "offload": True}, "pruning.offload: got True; leave it out"),
    ],
)
def test_settings_that_masks_do_not_go_with_are_refused_in_a_line(tmp_path, pruning, line):
    with pytest.raises(InputError) as error:
        parse_recipe({**recipe_for(tmp_path), "pruning": {"keep": 0.5, **pruning}})
    lines = [str(fault) for fault in faults_in(error.value)]
    assert any(line in each for each in lines), lines
    assert all("\n" not in each and len(each) <= 300 for each in lines)


@pytest.mark.parametrize(
    "sections, line",
    [
        ({"distillation": None}, "add a distillation section, whose losses they learn with"),
        ({"student": {"peft": {"r": 2}}}, "student.peft: got {'r': 2}; remove it, or pruning.masks: all weights learn"),
        (
            {"teacher": {"model": "x", "moving_average": {}}},
            "teacher.moving_average: masks are learnt from the teacher itself",
        ),
    ],
)
def test_sections_that_masks_do_not_go_with_are_refused_in_a_line(tmp_path, sections, line):
    with pytest.raises(InputError) as error:
        parse_recipe({**recipe_for(tmp_path), "pruning": {"keep": 0.5, "masks": {}}, **sections})
    assert any(line in str(fault) for fault in faults_in(error.value)), error.value


def test_the_door_names_training_fields_and_models_that_masks_do_not_go_with(inputs, tmp_path):
    train = {"load_best_model_at_end": True, "eval_strategy": "steps", "use_cpu": True}
    given = {**masked_recipe(inputs, train=train), "output_dir": str(tmp_path / "run")}
    given["data"] = {**given["data"], "holdout_examples": 8}
    (line,) = faults_at_the_door(parse_recipe(given))
    assert line.startswith("pruning.masks.train.load_best_model_at_end: got True; set it to false while masks learn")
    write_decoder(tmp_path / "teacher", "olmo2")
    (tmp_path / "corpus.txt").write_text("the film is good\n\n" * 200)
    given = recipe_for(
        tmp_path,
        data={"task": "text", "path": str(tmp_path / "corpus.txt"), "max_length": 16},
        pruning={"keep": 0.5, "masks": {}},
    )
    lines = faults_at_the_door(parse_recipe(given))
    assert any(line.startswith("pruning.masks: got 'l0'; leave heads out of units") for line in lines), lines
    given["pruning"]["units"] = ["neurons"]
    assert not [line for line in faults_at_the_door(parse_recipe(given)) if "masks" in line]


def test_a_dry_run_says_what_will_be_learnt_and_fields_of_the_training_are_its_own(tmp_path):
    recipe = recipe_with(
        tmp_path, pruning={"keep": 0.1, "masks": {"by": "movement", "warm_up": 0.75, "train": {"max_steps": 7}}}
    )
    assert masks_note(recipe) == [
        "round-1/masks: heads and neurons get masks by movement; the share of params kept falls from 1 to 0.1 over the first"
        " 75% of the steps; learning rate of masks 0.01"
    ]
    assert recipe.training("masks")["max_steps"] == 7 and "max_steps" not in recipe.training("final")
    assert masks_note(recipe_with(tmp_path)) == []


def test_a_preview_has_a_plan_and_a_price_of_the_training_of_masks(inputs, tmp_path):
    found = preview(parse_recipe({**masked_recipe(inputs), "output_dir": str(tmp_path / "run")}))
    assert found.stages[:4] == ("teacher", "round-1/masks", "round-1/prune", "round-1/recover")
    assert found.plan is not None and 0.49 < found.plan.kept <= 0.5
    assert found.forecast is not None, found.notes
    priced = {stage.name: stage for stage in found.forecast.stages}
    assert priced["round-1/masks"].flops > priced["round-1/recover"].flops  # more steps, of a larger student
    assert [note for note in found.notes if note.startswith("round-1/masks: heads and neurons and attention and ffn")]


def test_sizes_of_a_sweep_share_no_statistics_and_prune_alone_learns_no_masks(tmp_path):
    recipe = recipe_with(tmp_path, pruning={"keep": 0.5, "masks": {}})
    cells = cells_of(recipe, {"pruning.keep": [0.5, 0.3]}, tmp_path)
    assert [cell.recipe.pruning.statistics for cell in cells] == [None, None]
    with pytest.raises(InputError, match="pruning.masks: got 'l0'; leave it out, or use `distill-llm run`"):
        open_pruning(recipe)


def test_the_recipe_of_the_page_is_one(tmp_path):
    (block, *_) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    recipe = parse_recipe({**recipe_for(tmp_path), **yaml.safe_load(block)})
    assert recipe.pruning is not None and recipe.pruning.masks is not None
