"""Training fields that would fail, or do nothing, long after the start: refused at the door with one line each."""

import importlib.util
import json
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import accelerate.utils
import pytest
from accelerate.utils import DistributedType
from builders.causal import causal_model, word_tokenizer
from builders.recipes import faults_at_the_door as faults
from builders.recipes import recipe_with, write_model, write_rows
from datasets import Dataset
from transformers.training_args import OptimizerNames

from distill_llm.checks import training as training_checks
from distill_llm.checks.training import OPTIMIZER_PACKAGES, check_training
from distill_llm.training.refusals import dispatching, whole_copies
from distill_llm.training.trainer import DistillationConfig


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
    ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "deepspeed", "install deepspeed"),
    ({"fsdp_config": "no/such/file.json"}, "fsdp_config", "an existing JSON file"),
    ({"accelerator_config": "no/such/file.json"}, "accelerator_config", "an existing JSON file"),
    ({**REENTRANT, A_KWARGS: {"use_reentrant": True}}, A_KWARGS + ".use_reentrant", "false"),
    ({**REENTRANT, G_KWARGS: '{"use_reentrant": true}'}, G_KWARGS + ".use_reentrant", "false"),
    ({"metric_for_best_model": "accuray"}, "metric_for_best_model", "'accuracy' (the nearest)"),
    ({"metric_for_best_model": "eval_spearmanr"}, "metric_for_best_model", "one of loss, accuracy, f1"),
    ({"eval_strategy": "epoch"}, "eval_strategy", "set data.holdout_examples"),
    ({"eval_on_start": True}, "eval_on_start", "set data.holdout_examples"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end", "set data.holdout_examples"),
    ({"save_strategy": "best"}, "save_strategy", "set data.holdout_examples"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type", "min_lr"),
    ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs", "'foo'"),
    ({"torch_compile": True}, "torch_compile", "losses read values inside the student's forward"),
    ({"torch_compile_mode": "default"}, "torch_compile_mode", "losses read values inside the student's forward"),
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
    assert line.startswith((f"{section}.{name}: got ", f"{section}.{name}: not given; "))
    assert words in line.split("; ", 1)[1] and "\n" not in line and "seed" not in line


def test_a_launch_that_compiles_is_refused_too(folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert faults(recipe_with(folder)) == []
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    (line,) = faults(recipe_with(folder))
    assert line.startswith("distillation.torch_compile: got 'INDUCTOR (ACCELERATE_DYNAMO_BACKEND)'")


def test_a_fault_of_several_fields_shows_those_and_no_other(folder):
    steps = {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 10, "load_best_model_at_end": True}
    (line,) = faults(recipe_with(folder, teacher__train=steps, data__holdout_examples=8))
    assert line.startswith("teacher.train.load_best_model_at_end: got True;") and "multiple" in line
    both = {"fp16_full_eval": True, "bf16_full_eval": True, "num_train_epochs": 2}
    (line,) = faults(recipe_with(folder, teacher__train=both))
    assert line.startswith("teacher.train: got 'fields that contradict each other';") and "both" in line


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
        "distill_llm.checks.training.DistillationConfig",
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


def sharded_faults(folder, monkeypatch, sharding, **changes):
    monkeypatch.setattr(training_checks, "sharding_of", lambda args: sharding)
    return faults(recipe_with(folder, **changes))


@pytest.mark.parametrize("sharding", [None, "FSDP1", "FSDP2", "DeepSpeed"])
def test_what_cannot_learn_while_it_is_divided_among_processes_is_refused_at_the_door(folder, monkeypatch, sharding):
    write_model(folder / "narrow", hidden=24)
    lora = {"student__peft": {"r": 2, "target_modules": ["query"]}}
    given = {"student__model": str(folder / "narrow"), "pruning": None, "distillation__losses": {"embeddings": {}}}
    pruned = {"distillation__losses": {"hidden": {}}, "pruning__units": ["hidden", "neurons"]}
    found = [sharded_faults(folder, monkeypatch, sharding, **changes) for changes in (lora, given, pruned)]
    adapters = f"student.peft: got {sharding!r}; use DDP: adapters cannot be sharded here"
    projections = "distillation.losses.embeddings: got 'states of 24 and 32 channels under DeepSpeed'"
    assert found[0] == ([adapters] if sharding else [])
    assert [line.startswith(projections) for line in found[1]] == [True] * (sharding == "DeepSpeed")
    assert found[2] == []


@pytest.mark.parametrize("sharding", [None, "FSDP1", "FSDP2", "DeepSpeed"])
def test_a_students_own_answers_need_its_whole_weights(tmp_path, monkeypatch, sharding):
    for part in (causal_model(), word_tokenizer()):
        part.save_pretrained(tmp_path / "teacher")
    rows = [json.dumps({"prompt": f"w{i}", "response": f"w{i + 1}"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"task": "prompts", "path": str(tmp_path / "rows.jsonl"), "max_length": 16}
    losses = {"logits": {}, "responses": {"max_new_tokens": 8}}
    found = sharded_faults(tmp_path, monkeypatch, sharding, data=data, distillation__losses=losses)
    line = f"distillation.losses.responses: got 'a student sharded by {sharding}'; accepted: FSDP2"
    assert [each.startswith(line) for each in found] == [True] * (sharding in ("FSDP1", "DeepSpeed"))


@pytest.mark.parametrize("sharding", [None, "FSDP2"])
def test_exits_of_a_language_model_need_its_whole_head(tmp_path, monkeypatch, sharding):
    for part in (causal_model(), word_tokenizer()):
        part.save_pretrained(tmp_path / "teacher")
    rows = [json.dumps({"prompt": f"w{i}", "response": f"w{i + 1}"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"task": "prompts", "path": str(tmp_path / "rows.jsonl"), "max_length": 16}
    found = sharded_faults(tmp_path, monkeypatch, sharding, data=data, exits=[1])
    line = f'distillation.losses.exits: got "a language model\'s exits under {sharding}"; accepted: DDP'
    assert [each.startswith(line) for each in found] == [True] * (sharding is not None), found


def test_steps_that_deepspeed_takes_cannot_be_skipped(folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(accelerate.utils, "DeepSpeedPlugin", MagicMock())  # it is not installed
    line = "final.on_nonfinite: got 'skip'; set it to stop: DeepSpeed takes each step within the backward pass"
    two = {"pruning__rounds": 2, "distillation__on_nonfinite": "stop"}
    assert faults(recipe_with(folder, **two)) == []
    (fault,) = faults(recipe_with(folder, **two, final__on_nonfinite="skip"))
    assert fault.startswith(line)


@pytest.mark.parametrize(
    ("launched", "given", "wanted"),
    [
        ({}, {}, None),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}, "FSDP2"),
        ({}, {"fsdp": True}, "FSDP2"),
        ({}, {"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed"),
    ],
)
def test_sharding_is_known_from_the_launch_or_the_fields(tmp_path, monkeypatch, launched, given, wanted):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    if wanted == "DeepSpeed":  # which is not installed
        monkeypatch.setattr(accelerate.utils, "DeepSpeedPlugin", MagicMock())
    args = DistillationConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, **given)
    if wanted != "DeepSpeed":
        assert training_checks.sharding_of(args) is None, "accelerate shards on no CPU"
    args.distributed_state = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    assert training_checks.sharding_of(args) == wanted


@pytest.mark.parametrize(
    ("launched", "given", "line"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fsdp: got 'true (ACCELERATE_USE_FSDP)'; take ddp: "),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "deepspeed: got 'true (ACCELERATE_USE_DEEPSPEED)'; take ddp: "),
        ({}, {"fsdp": True}, "fsdp: got True; take ddp: accelerate divides a model among GPUs only"),
        ({}, {}, None),
    ],
)
def test_what_would_train_whole_copies_on_cpus_is_refused(tmp_path, monkeypatch, launched, given, line):
    args = DistillationConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, **given)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert whole_copies(args) == [], "one process has it all anyway"
    args.distributed_state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    found = [str(fault) for fault in whole_copies(args)]
    assert [each.startswith(line or "") for each in found] == [True] * bool(line)


@pytest.mark.parametrize("asked", [True, False, None])
@pytest.mark.parametrize("processes", [1, 2])
def test_batches_of_a_teacher_that_adds_to_them_are_not_cut_by_rows(tmp_path, asked, processes):
    args = DistillationConfig(str(tmp_path), report_to=[], use_cpu=True, accelerator_config={"dispatch_batches": asked})
    args = SimpleNamespace(accelerator_config=args.accelerator_config, world_size=processes)
    listed, streamed = Dataset.from_dict({"a": [1]}), Dataset.from_dict({"a": [1]}).to_iterable_dataset()
    assert bool(dispatching(True, args, listed)) == bool(asked)
    assert bool(dispatching(True, args, streamed)) == (asked is True or (asked is None and processes > 1))
    assert dispatching(False, args, streamed) == []
    for fault in dispatching(True, args, streamed):
        assert str(fault).startswith("accelerator_config: got {'dispatch_batches': ") and "to false" in str(fault)
