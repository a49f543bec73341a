"""Training fields that would fail, or do nothing, long after the start: refused at the door with one line each."""

import importlib.util
import re

import pytest
from recipe_inputs import faults_at_the_door as faults
from recipe_inputs import recipe_with, write_model, write_rows
from transformers.training_args import OptimizerNames

from distill_llm.trainer import DistillationConfig
from distill_llm.training_checks import OPTIMIZER_PACKAGES, check_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher and rows that fit the recipe of `recipe_for`."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "teacher")
    write_rows(folder / "rows.csv")
    return folder


REENTRANT = {"losses": {"attention": {}}, "activation_checkpointing": True}
A_KWARGS, G_KWARGS = "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"
BAD = [
    ({"fp16": True, "use_cpu": True}, "fp16", "bf16"),
    ({"optim": "adamw"}, "optim", "'adamw_torch' (the nearest)"),
    ({"optim": "adam"}, "optim", "'adamw_torch' (the nearest)"),
    ({"train_sampling_strategy": "by_length"}, "train_sampling_strategy", "'group_by_length' (the nearest)"),
    ({"eval_strategy": True}, "eval_strategy", "one of no, steps, epoch"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor", "dataloader_num_workers"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type", "eval strategy"),
    ({"report_to": "wandbb"}, "report_to", "'wandb' (the nearest)"),
    ({"report_to": None}, "report_to", "none"),
    ({"report_to": "neptune"}, "report_to", "neptune is not installed"),
    ({"report_to": ["none", "neptune"]}, "report_to", "neptune is not installed"),
    ({"optim": "lomo"}, "optim", "install lomo_optim"),
    ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "deepspeed", "deepspeed is not installed"),
    ({"fsdp_config": "no/such/file.json"}, "fsdp_config", "an existing JSON file"),
    ({"accelerator_config": "no/such/file.json"}, "accelerator_config", "an existing JSON file"),
    ({**REENTRANT, A_KWARGS: {"use_reentrant": True}}, A_KWARGS + ".use_reentrant", "false"),
    ({**REENTRANT, G_KWARGS: '{"use_reentrant": true}'}, G_KWARGS + ".use_reentrant", "false"),
    ({"metric_for_best_model": "accuray"}, "metric_for_best_model", "'accuracy' (the nearest)"),
    ({"metric_for_best_model": "eval_spearmanr"}, "metric_for_best_model", "one of loss, accuracy, f1"),
    ({"eval_strategy": "epoch"}, "eval_strategy", "data.holdout_examples > 0"),
    ({"eval_on_start": True}, "eval_on_start", "data.holdout_examples > 0"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end", "data.holdout_examples > 0"),
    ({"save_strategy": "best"}, "save_strategy", "data.holdout_examples > 0"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type", "min_lr"),
    ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs", "'foo'"),
    ({"adam_beta1": 5.0}, "adam_beta1", "Invalid beta parameter"),
    ({"adam_epsilon": -1.0}, "adam_epsilon", "Invalid epsilon value"),
]  # fmt: skip


@pytest.mark.parametrize("section", ["distillation", "final", "teacher.train"])
@pytest.mark.parametrize(("given", "name", "words"), BAD)
def test_one_thing_wrong_gives_one_line_at_its_field(folder, section, given, name, words):
    packages = {"lomo": "lomo_optim", "deepspeed": "deepspeed", "neptune": "neptune"}
    for word, package in packages.items():
        if word in str(given) and importlib.util.find_spec(package):
            pytest.skip(f"{package} is installed")
    given, changes = dict(given), {}
    if "losses" in given:
        if section == "teacher.train":
            pytest.skip("a teacher learns from the labels alone")
        changes["distillation__losses"] = given.pop("losses")
    if section == "distillation":
        changes |= {f"distillation__{field}": value for field, value in given.items()}
    else:
        changes[section.replace(".", "__")] = given
    (line,) = faults(recipe_with(folder, **changes))
    assert line.startswith(f"{section}.{name}: got ")
    assert words in line.split("; accepted: ")[1] and "\n" not in line and "seed" not in line


def test_a_fault_of_several_fields_shows_those_and_no_other(folder):
    steps = {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 10, "load_best_model_at_end": True}
    (line,) = faults(recipe_with(folder, teacher__train=steps, data__holdout_examples=8))
    assert line.startswith("teacher.train.load_best_model_at_end: got True;") and "multiple" in line
    both = {"fp16_full_eval": True, "bf16_full_eval": True, "num_train_epochs": 2}
    (line,) = faults(recipe_with(folder, teacher__train=both))
    assert line.startswith("teacher.train: got 'fields that contradict';") and "both" in line


def test_with_held_out_rows_a_model_may_be_chosen_by_the_tasks_metrics(folder):
    held_out = {"data__holdout_examples": 8}
    for metric in ("loss", "eval_loss", "accuracy", "eval_f1", None):
        chosen = {"load_best_model_at_end": True, "eval_strategy": "epoch", "metric_for_best_model": metric}
        assert faults(recipe_with(folder, final=chosen, **held_out)) == []
    (line,) = faults(recipe_with(folder, final={"load_best_model_at_end": True}, **held_out))
    assert line.startswith("final.load_best_model_at_end: got True;") and "eval_strategy" in line


def test_own_validation_rows_are_enough_to_evaluate_on(folder, tmp_path):
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.csv")
    changes = {"data__path": str(tmp_path), "distillation__eval_strategy": "epoch"}
    assert faults(recipe_with(folder, **changes)) == []


def test_files_and_installed_packages_pass(folder, tmp_path):
    (tmp_path / "accelerator.json").write_text('{"even_batches": false}')
    assert faults(recipe_with(folder, final={"accelerator_config": str(tmp_path / "accelerator.json")})) == []
    assert faults(recipe_with(folder, final={"report_to": "all", "optim": "adafactor", "save_total_limit": None})) == []
    if importlib.util.find_spec("tensorboardX") or importlib.util.find_spec("tensorboard"):
        assert faults(recipe_with(folder, final={"report_to": ["tensorboard"]})) == []


def test_only_the_optimizers_of_torch_and_transformers_need_no_package():
    names = {name.value for name in OptimizerNames}
    plain = {name for name in names if not any(re.fullmatch(pattern, name) for pattern, _ in OPTIMIZER_PACKAGES)}
    assert plain == {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}


def test_what_is_checked_is_what_the_run_trains_with(folder, monkeypatch):
    made = []
    monkeypatch.setattr(
        "distill_llm.training_checks.DistillationConfig",
        lambda **fields: made.append(fields) or DistillationConfig(**fields),
    )
    recipe = recipe_with(folder, final={"save_steps": 7}, teacher__train={"optim": "sgd"}, pruning__rounds=2)
    check_training(recipe, None)
    losses = recipe.distillation.losses.model_dump(mode="json", exclude_none=True)
    wanted = [{"labels": {}}, losses, losses]
    assert made == [
        {"output_dir": str(recipe.output_dir), "losses": loss, **recipe.training(stage)}
        for stage, loss in zip(("teacher", "recovery", "final"), wanted, strict=True)
    ]


def test_a_fault_of_both_recoveries_is_one_line_and_an_overridden_one_is_none(folder):
    assert len(faults(recipe_with(folder, distillation__optim="adamw", pruning__rounds=2))) == 1
    two = {"distillation__optim": "adamw", "final": {"optim": "sgd"}}
    (line,) = faults(recipe_with(folder, **two, pruning__rounds=2))
    assert line.startswith("distillation.optim: ")
    assert faults(recipe_with(folder, **two)) == []
