"""Recipes: defaults, overrides, and the line that every kind of fault in the file gives."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders.recipes import recipe_for, write_recipe
from transformers import TrainingArguments

from distill_llm.common.errors import InputError, faults_in
from distill_llm.common.precision import mixed_precision
from distill_llm.recipe.recipe import (
    load_recipe,
    parse_recipe,
    recipe_folder,
    recipe_names,
)
from distill_llm.recipe.training_fields import (
    RESERVED,
    TRAINING_DEFAULTS,
    check_training_fields,
    training_fields,
)


def lines(folder: Path, *settings: str, **sections: object) -> list[str]:
    """The lines that a recipe with these overrides and sections gives; there must be some."""
    with pytest.raises(InputError) as error:
        load_recipe(write_recipe(folder, recipe_for(folder, **sections)), list(settings))
    assert str(error.value) == "\n".join(str(fault) for fault in faults_in(error.value))
    return [str(fault) for fault in faults_in(error.value)]


BAD = {
    "pruning.keep=1.7": ("pruning.keep: got 1.7;", "above 0 and at most 1"),
    "pruning.keep=0": ("pruning.keep: got 0;", "above 0 and at most 1"),
    "pruning.keep=lots": ("pruning.keep: got 'lots';", "a number above 0"),
    "pruning.keep=null": ("pruning.keep: not given;", "above 0 and at most 1"),
    "pruning.rounds=0": ("pruning.rounds: got 0;", "a whole number of at least 1"),
    "pruning.rounds=1.5": ("pruning.rounds: got 1.5;", "a whole number"),
    "pruning.kep=0.5": ("pruning.kep: got 0.5;", "'keep' (the nearest)"),
    "prunning.keep=0.5": ("prunning: got", "'pruning' (the nearest)"),
    "pruning.criterion=fischer": ("pruning.criterion: got 'fischer';", "'fisher' (the nearest)"),
    "pruning.units=[heads, neuron]": ("pruning.units.1: got 'neuron';", "'neurons' (the nearest)"),
    "pruning.units=[heads, heads]": ("pruning.units: got ['heads', 'heads'];", "at most once"),
    "pruning.units=[]": ("pruning.units: got [];", "a list"),
    "pruning.layers=[0, 1]": ("pruning.keep: got 0.5;", "`layers`"),
    "pruning.compensate=perhaps": ("pruning.compensate: got 'perhaps';", "true, false or in_order"),
    "pruning=half": ("pruning: got 'half';", "a mapping with keep"),
    "pruning=null": ("pruning: not given;", "student.model"),
    "student.model=other": ("student.model: got 'other';", "pruning"),
    "distillation.losses.logits.temperature=-2": ("distillation.losses.logits.temperature: got -2;", "above 0"),
    "distillation.losses.logits.weight=-1": ("distillation.losses.logits.weight: got -1;", "at least 0"),
    "distillation.losses.logit.weight=1": ("distillation.losses.logit: got", "'logits' (the nearest)"),
    "distillation.losses.hidden.layers=linage": ("distillation.losses.hidden.layers: got 'linage';", "'lineage'"),
    "distillation.losses.hidden.layers=[[0, x]]": (
        "distillation.losses.hidden.layers: got [[0, 'x']];",
        "whole number",
    ),
    "distillation.learning_rat=1e-4": ("distillation.learning_rat: got 0.0001;", "'learning_rate' (the nearest)"),
    "distillation.learning_rate=fast": ("distillation.learning_rate: got 'fast';", "a number"),
    "distillation.learning_rate=-1e-4": ("distillation.learning_rate: got -0.0001;", "at least 0"),
    "distillation.per_device_train_batch_size=0": ("distillation.per_device_train_batch_size: got 0;", "at least 1"),
    "distillation.bf16=7": ("distillation.bf16: got 7;", "true or false"),
    "distillation.num_train_epochs=true": ("distillation.num_train_epochs: got True;", "a number"),
    "teacher.train.epochs=3": ("teacher.train.epochs: got 3;", "TrainingArguments"),
    "teacher.train=3": ("teacher.train: got 3;", "a mapping"),
    "distillation.group_by_length=true": (
        "distillation.group_by_length: got True;",
        "train_sampling_strategy: group_by_length",
    ),
    "distillation.label_smoothing_factor=1": ("distillation.label_smoothing_factor: got 1;", "below 1"),
    "distillation.label_smoothing_factor=-0.1": ("distillation.label_smoothing_factor: got -0.1;", "at least 0"),
    "distillation.max_steps=0": ("distillation.max_steps: got 0;", "at least 1, or -1"),
    "distillation.save_only_model=true": ("distillation.save_only_model: got True;", "remove it"),
    "distillation.ignore_data_skip=true": ("distillation.ignore_data_skip: got True;", "remove it"),
    "distillation.learning_rate=.inf": ("distillation.learning_rate: got inf;", "a finite number"),
    "distillation.save_total_limit=1": ("distillation.save_total_limit: got 1;", "at least 2"),
    "final.output_dir=x": ("final.output_dir: got 'x';", "output_dir at the top of the recipe"),
    "final.seed=1": ("final.seed: got 1;", "seed at the top of the recipe"),
    "teacher.model=null": ("teacher.model: not given;", "Hub id"),
    "teacher.dtype=float16": ("teacher.dtype: got 'float16';", "float32"),
    "teacher=null": ("teacher: not given;", "a mapping with model"),
    "data.task=[1]": ("data.task: got [1];", "a GLUE task"),
    "data.max_length=long": ("data.max_length: got 'long';", "a whole number of at least 8"),
    "data.columns.txt=a": ("data.columns.txt: got 'a';", "'text' (the nearest)"),
    "evaluation.latency.batch_size=0": ("evaluation.latency.batch_size: got 0;", "at least 1"),
    "hub.repo_id=nameless": ("hub.repo_id: got 'nameless';", "USER_OR_ORGANISATION/NAME"),
    "data.holdout_examples=yes": ("data.holdout_examples: got 'true';", "a whole number of at least 0"),
    "pruning.keep=true": ("pruning.keep: got 'true';", "a number above 0"),
    "seed=x": ("seed: got 'x';", "a whole number"),
    "seed.x=1": ("--set: got 'seed.x=1';", "seed is 3"),
    "pruning.keep": ("--set: got 'pruning.keep';", "NAME.NAME=VALUE"),
    "pruning.keep=[": ("--set pruning.keep: got '[';", "valid YAML"),
}


@pytest.mark.parametrize("setting", BAD)
def test_a_bad_value_gives_one_line_with_field_given_and_accepted(tmp_path, setting):
    field, accepted = BAD[setting]
    (line,) = lines(tmp_path, setting, seed=3)
    assert line.startswith(field)
    _, done = line.split("; ", 1)
    assert (
        done.startswith(("accepted: ", "remove it", "leave it out", "write ", "set ", "add ", "choose "))
        and accepted in done
    )
    assert "\n" not in line


def test_every_fault_is_reported_a_line_each(tmp_path):
    settings = [
        "pruning.keep=2",
        "pruning.round=1",
        "final.optm=x",
        "distillation.losses.labels.weight=x",
        "distillation.sed=1",
    ]
    found = lines(tmp_path, *settings)
    assert sorted(line.split(":")[0] for line in found) == sorted(setting.split("=")[0] for setting in settings)


@pytest.mark.parametrize(
    ("pruning", "field"),
    [
        ({"layers": [1, 0]}, "pruning.layers"),
        ({"layers": [0, 1], "rounds": 2}, "pruning.rounds"),
        ({"keep": 0.5, "units": ["heads"], "round_to": 16}, "pruning.round_to"),
        ({"keep": 0.5, "units": ["layers"], "uniform": True}, "pruning.uniform"),
        ({"keep": 0.5, "criterion": "block_influence"}, "pruning.units"),
        ({"keep": 0.5, "units": ["heads", "ffn"], "criterion": "taylor"}, "pruning.criterion"),
        ({"keep": 0.5, "units": ["heads", "ffn"], "scope": "local"}, "pruning.scope"),
        ({"rounds": 2}, "pruning.keep"),
    ],
)
def test_pruning_fields_that_contradict_each_other_are_refused(tmp_path, pruning, field):
    (line,) = lines(tmp_path, pruning=pruning)
    assert line.startswith((f"{field}: got ", f"{field}: not given; "))


def test_training_fields_need_something_to_train(tmp_path):
    assert [line.split(":")[0] for line in lines(tmp_path, "distillation=null", final={"optim": "sgd"})] == ["final"]
    found = lines(tmp_path, "distillation=null", "pruning=null", student={"model": "x"})
    assert [line.split(":")[0] for line in found] == ["distillation"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", ["line 2", "'seed'", "line 1"]),
        ("teacher: {model: a\nseed: 1\n", ["line 2", "valid YAML"]),
        ("- a\n- b\n", ["got 'list'", "a mapping of sections"]),
        ("", ["got 'NoneType'", "a mapping of sections"]),
        ("[1]: 2\n", ["valid YAML"]),
    ],
)
def test_a_file_that_is_no_recipe_gives_one_line(tmp_path, text, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe(file)
    assert str(error.value).count("\n") == 0
    assert all(word in str(error.value) for word in words)


def test_a_file_that_is_missing_or_not_text_gives_one_line(tmp_path):
    with pytest.raises(InputError, match="RECIPE: got 'quickstat'; accepted: a YAML file, or 'quickstart'"):
        load_recipe("quickstat")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_overrides_set_values_of_any_depth_and_make_sections(tmp_path):
    settings = ["pruning.keep=0.25", "distillation.learning_rate=3e-4", "distillation.losses.hidden.layers=[[0, 1]]"]
    settings += ["hub.repo_id=me/it", "pruning.units=[neurons]", "final.num_train_epochs=2", "data.columns.text=body"]
    recipe = load_recipe(write_recipe(tmp_path, recipe_for(tmp_path)), settings)
    assert recipe.pruning.keep == 0.25 and recipe.pruning.units == ["neurons"]
    assert recipe.distillation.losses.hidden.layers == [(0, 1)]
    assert recipe.hub.repo_id == "me/it" and recipe.data.columns.text == "body" and recipe.data.columns.label == "mood"
    assert recipe.training("recovery")["learning_rate"] == 3e-4


def test_numbers_that_yaml_takes_for_text_become_numbers(tmp_path):
    text = yaml.safe_dump(recipe_for(tmp_path)) + "final: {learning_rate: 5e-5, warmup_steps: '0.1', max_steps: 1_0}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").final == {"learning_rate": 5e-5, "warmup_steps": 0.1, "max_steps": 10}


def test_stages_take_their_own_training_fields_and_the_seed(tmp_path):
    sections = {"seed": 7, "final": {"num_train_epochs": 4}}
    recipe = parse_recipe(recipe_for(tmp_path, **sections, teacher={"model": "x", "train": {"optim": "sgd"}}))
    assert own(recipe.training("teacher")) == {"seed": 7, "optim": "sgd"}
    assert own(recipe.training("recovery")) == {"seed": 7, "num_train_epochs": 1}
    assert own(recipe.training("final")) == {"seed": 7, "num_train_epochs": 4}


def own(fields: dict) -> dict:
    """The fields that are not this project's defaults."""
    return {name: value for name, value in fields.items() if name not in (*TRAINING_DEFAULTS, "use_cpu")}


def test_the_fields_of_a_stage_are_the_defaults_under_the_recipes_own(tmp_path):
    recipe = parse_recipe(recipe_for(tmp_path, final={"save_steps": 10, "report_to": "tensorboard", "use_cpu": True}))
    fields = recipe.training("recovery")
    assert {name: fields[name] for name in TRAINING_DEFAULTS} == TRAINING_DEFAULTS
    assert fields["ddp_timeout"] == 86400 and fields["save_total_limit"] == 2
    assert fields["use_cpu"] is not torch.accelerator.is_available()
    fields = recipe.training("final")
    assert (fields["save_steps"], fields["report_to"], fields["use_cpu"]) == (10, "tensorboard", True)
    assert fields["logging_steps"] == TRAINING_DEFAULTS["logging_steps"]


@pytest.mark.parametrize(
    ("given", "strategy", "steps"),
    [
        ({"eval_strategy": "epoch"}, "epoch", None),
        ({"eval_strategy": "steps", "eval_steps": 0.1}, "steps", 0.1),
        ({"eval_strategy": "steps", "eval_steps": 30}, "steps", 30),
        ({"eval_strategy": "steps"}, "steps", 0.05),
        ({"eval_strategy": "steps", "eval_steps": 30, "save_steps": 60}, "steps", 60),
        ({"eval_strategy": "epoch", "save_strategy": "best"}, "best", None),
    ],
)
def test_checkpoints_are_saved_when_the_model_is_evaluated_to_load_the_best(tmp_path, given, strategy, steps):
    recipe = parse_recipe(recipe_for(tmp_path, distillation={"load_best_model_at_end": True, **given}))
    fields = recipe.training("recovery")
    assert fields["save_strategy"] == strategy and steps in (None, fields["save_steps"])
    args = TrainingArguments(output_dir=str(tmp_path), **fields)  # refuses two strategies that do not match
    assert args.load_best_model_at_end
    fields = parse_recipe(recipe_for(tmp_path, distillation=given)).training("recovery")
    assert fields["save_strategy"] == given.get("save_strategy", "steps")


def test_a_bare_no_is_the_word_for_the_strategies(tmp_path):
    text = (
        yaml.safe_dump(recipe_for(tmp_path)) + "final: {eval_strategy: no, save_strategy: no, logging_strategy: off}\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.final == {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    assert load_recipe(write_recipe(tmp_path, yaml.safe_load(recipe.to_yaml()))) == recipe


def test_reading_a_recipe_does_not_import_torch(tmp_path):
    file = write_recipe(tmp_path, recipe_for(tmp_path, teacher={"model": "x", "train": {"bf16": True}}))
    read = f"from distill_llm.recipe.recipe import load_recipe; load_recipe({str(file)!r})"
    code = f"import sys; {read}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_teacher_follows_the_precision_of_the_training_unless_told(tmp_path):
    assert parse_recipe(recipe_for(tmp_path)).teacher.dtype is None
    teacher = {"model": "x", "dtype": "bfloat16"}
    assert parse_recipe(recipe_for(tmp_path, teacher=teacher)).teacher.dtype == "bfloat16"


def test_the_run_folder_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_recipe(recipe_for(tmp_path, output_dir="~/run")).output_dir == tmp_path / "run"
    assert (
        load_recipe(write_recipe(tmp_path, recipe_for(tmp_path)), ["output_dir=~/a/b"]).output_dir == tmp_path / "a/b"
    )


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = parse_recipe(recipe_for(tmp_path, final={"optim": "sgd"}))
    file = tmp_path / "resolved.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert "criterion: fisher" in recipe.to_yaml(), "defaults are written out"


def test_the_run_folder_is_named_after_the_file(tmp_path):
    mapping = recipe_for(tmp_path)
    del mapping["output_dir"]
    assert load_recipe(write_recipe(tmp_path, mapping)).output_dir == Path("runs/recipe")


def test_training_fields_are_those_of_the_installed_transformers():
    assert set(training_fields()) == {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(RESERVED) <= set(training_fields())


def test_what_to_do_at_a_step_that_is_not_finite_is_a_field_of_every_training(tmp_path):
    skip = {"on_nonfinite": "skip"}
    own = recipe_for(tmp_path, final=skip, distillation={"losses": {"labels": {}}, **skip})
    assert all(parse_recipe(own).training(stage)["on_nonfinite"] == "skip" for stage in ("recovery", "final"))
    for given, words in (
        ("skipp", "'skip' (the nearest), or one of stop, skip"),
        (["skip"], "'skip' (the nearest), or one of stop, skip"),
    ):
        with pytest.raises(InputError, match=re.escape(f"final.on_nonfinite: got {given!r}; accepted: {words}")):
            parse_recipe(recipe_for(tmp_path, final={"on_nonfinite": given}))


def test_defaults_of_training_arguments_pass_their_own_check():
    given = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.default is not dataclasses.MISSING}
    _, faults = check_training_fields({name: value for name, value in given.items() if name not in RESERVED})
    assert faults == []


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_are_scripts_and_describe_themselves(name):
    file = recipe_folder() / f"{name}.yaml"
    recipe = load_recipe(name)
    assert recipe.output_dir == Path("runs") / name
    assert recipe.description != "" and recipe.gallery is not None
    assert "gallery" not in recipe.to_yaml()  # it may change while a run goes on
    small = load_recipe(name, recipe.gallery.here)
    assert recipe.gallery.here == [] or small != recipe
    assert file.read_text().startswith("#!/usr/bin/env -S distill-llm run\n")
    assert os.access(file, os.X_OK)


def test_all_promised_recipes_are_shipped():
    assert set(recipe_names()) >= {"quickstart", "bert_sst2", "bert_to_distilbert", "bert_glue_95"}
    launch = yaml.safe_load((recipe_folder() / "accelerate" / "ddp.yaml").read_text())
    assert launch["distributed_type"] == "MULTI_GPU"


@pytest.mark.parametrize(
    "field", ["distillation.hub_token", "description", "data.path", "hub.token", "nothing.like.it"]
)
def test_a_recipe_with_an_access_token_is_refused_in_a_line_that_does_not_show_it(field):
    token = "hf_" + "aB3dE" * 7
    given = {"teacher": {"model": "a/b"}, "data": {"task": "sst2"}}
    *sections, name = field.split(".")
    inner = given
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = f"https://me:{token}@host"
    with pytest.raises(InputError, match="access token") as error:
        parse_recipe(given)
    assert error.value.field == field and token[:8] not in str(error.value) and "<token>" in str(error.value)


def test_every_shipped_recipe_is_read_where_no_extra_is_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    monkeypatch.setitem(sys.modules, "peft", None)  # any import of it fails
    assert any((recipe.student and recipe.student.peft) for recipe in map(load_recipe, recipe_names()))


@pytest.mark.parametrize("fast", [True, False])
def test_the_device_decides_on_what_is_auto(tmp_path, monkeypatch, fast):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    given = recipe_for(tmp_path, teacher={"model": "x", "train": {"bf16": "auto"}})
    recipe = parse_recipe(given | {"final": {"bf16": "auto", "use_cpu": True}})
    assert recipe.training("final")["bf16"] is fast and recipe.training("teacher")["bf16"] is (
        fast or torch.cuda.is_available()
    )
    assert "bf16" not in recipe.training("recovery")
    assert yaml.safe_load(recipe.to_yaml())["final"]["bf16"] == "auto", "a run folder can move to another machine"
    assert mixed_precision("auto", torch.device("cpu")) == (torch.bfloat16 if fast else None)
    assert mixed_precision("bfloat16", torch.device("cpu")) is torch.bfloat16 and mixed_precision(None) is None
