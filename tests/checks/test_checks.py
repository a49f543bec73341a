"""What a recipe is checked for before any weight is read: each case is a real folder or file with one thing wrong."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
import yaml
from builders.causal import word_tokenizer
from builders.models import tiny_model
from builders.recipes import WORDS, causal_recipe, recipe_with, write_decoder, write_model, write_recipe, write_rows
from builders.recipes import faults_at_the_door as faults
from transformers import AutoTokenizer

from distill_llm.checks import models as model_checks
from distill_llm.checks.recipe import open_recipe
from distill_llm.common.errors import InputError
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.limits import longest_input
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.recipe.recipe import load_recipe
from distill_llm.teachers.compatibility import shared_classes


@pytest.fixture
def folder(tmp_path):
    """A folder with a teacher and rows that fit the recipe of `recipe_for`."""
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    return tmp_path


def write_and_load(folder, **model):
    """A tiny model, also written to `folder` with its tokenizer."""
    write_model(folder, **model)
    return load_pretrained(folder)


def test_a_recipe_that_fits_passes_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    assert faults(recipe_with(folder)) == []
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"teacher__model": "missing/folder/here"}, "teacher.model", "existing folder"),
        ({"teacher__model": "nobody/nothing"}, "teacher.model", "the Hub is off"),
        ({"teacher__model": "package://no_such_package/model"}, "teacher.model", "not installed"),
        ({"data__task": "sst3"}, "data.task", "'sst2' (the nearest)"),
        ({"data__path": "missing/folder/rows.csv"}, "data.path", "existing file or folder"),
        ({"data__columns__text": "revew"}, "data.columns", "review"),
        ({"data__train_examples": 500}, "data.train_examples", "training rows"),
        ({"data__max_length": 65}, "data.max_length", "at most 64"),
        ({"evaluation__latency__sequence_length": 65}, "evaluation.latency.sequence_length", "at most 64"),
        ({"pruning__calibration_examples": 41}, "pruning.calibration_examples", "the number of training rows"),
        ({"pruning__round_to": 65}, "pruning.round_to", "at most 64"),
        ({"pruning__min_heads": 5}, "pruning.min_heads", "at most 4"),
        ({"pruning__min_neurons": 65}, "pruning.min_neurons", "at most 64"),
        ({"hub": {"repo_id": "me/a..b"}}, "hub.repo_id", "OWNER/NAME"),
        ({"hub": {"repo_id": "me/student"}}, "hub.repo_id", "HF_HUB_OFFLINE"),
        ({"pruning": {"layers": [0, 3]}}, "pruning.layers", "indices from 0 to 2"),
        (
            {"distillation__losses__hidden": {"layers": [[3, 0]]}},
            "distillation.losses.hidden.layers",
            "student layers 0 to 2",
        ),
    ],
)
def test_one_thing_wrong_gives_one_line_with_field_given_and_accepted(folder, changes, field, words):
    found = faults(recipe_with(folder, **changes))
    assert len(found) == 1 and found[0].startswith(field), found
    assert "got " in found[0] and words in found[0].split("; ", 1)[1]


def test_as_many_calibration_rows_as_there_are_by_default(folder):
    assert faults(recipe_with(folder, pruning={"keep": 0.5})) == []
    written_out = load_recipe(
        write_recipe(folder, yaml.safe_load(recipe_with(folder, pruning={"keep": 0.5}).to_yaml()))
    )
    assert faults(written_out) == []


def test_a_tokenizer_for_shorter_rows_is_found_out_at_the_door(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.model_max_length = 12
    tokenizer.save_pretrained(folder / "teacher")
    assert faults(recipe_with(folder, data__max_length=12)) == []
    (line,) = faults(recipe_with(folder, data__max_length=16))
    assert line == "data.max_length: got 16; accepted: 3 to 12 for this tokenizer"


def test_a_config_with_a_word_for_a_number_gives_one_line(folder):
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "teacher" / "config.json").write_text(json.dumps(config | {"hidden_size": "abc"}))
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got") and "hidden_size" in line


def test_a_push_needs_a_token(folder, monkeypatch):
    monkeypatch.setattr("distill_llm.report.hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("distill_llm.report.hub.get_token", lambda: None)
    (line,) = faults(recipe_with(folder, hub={"repo_id": "me/student"}))
    assert line.startswith("hub.repo_id: got 'me/student'") and "token" in line
    monkeypatch.setattr("distill_llm.report.hub.get_token", lambda: "a token")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *_, **__: {"name": "me"})
    assert faults(recipe_with(folder, hub={"repo_id": "me/student"})) == []


def test_all_faults_are_reported_together(folder):
    recipe = recipe_with(folder, teacher__model="a/b/c", data__task="sst3", distillation__optim="adamw")
    assert [line.split(":")[0] for line in faults(recipe)] == ["teacher.model", "data.task", "distillation.optim"]


def test_labels_must_match_the_teachers_unless_it_is_trained(folder):
    write_rows(folder / "rows.csv", labels=("bad", "fair", "good"))
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and "with 2 labels" in line and "3 labels" in line
    assert faults(recipe_with(folder, teacher__train={"num_train_epochs": 1})) == []


def test_label_names_in_another_order_are_the_order_of_ones_own_data_and_refused_of_a_task_with_its_own(folder):
    def named(name, *labels):
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        write_model(folder / name, layers=2, **names)

    named("teacher", "POS", "NEG")
    assert open_recipe(recipe_with(folder)).data.task.label_names == ("POS", "NEG")
    student = {"student__model": str(folder / "student"), "pruning": None}
    named("student", "neg", "pos")
    (line,) = faults(recipe_with(folder, **student))
    assert line.startswith("student.model: got ") and "order" in line and "['POS', 'NEG']" in line
    named("teacher", "positive", "negative")
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + "the film\t1\n" * 20)
    (line,) = faults(recipe_with(folder, data={"task": "sst2", "path": str(folder), "max_length": 16}))
    assert line.startswith("teacher.model: got ") and "order" in line and "['negative', 'positive']" in line


def test_a_trained_head_with_as_many_labels_passes_whatever_its_names_are(folder):
    config = json.loads((folder / "teacher" / "config.json").read_text())
    for names in (["LABEL_0", "LABEL_1"], ["hated", "loved"], ["NEG", "Pos"], ["neg", "loved"]):
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (folder / "teacher" / "config.json").write_text(json.dumps(config))
        assert faults(recipe_with(folder)) == []


def test_a_teacher_without_the_tasks_head_must_be_trained(folder):
    write_model(folder / "teacher", head="base")
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and "ForSequenceClassification" in line and "teacher.train" in line
    assert faults(recipe_with(folder, teacher__train={"num_train_epochs": 1})) == []


def test_a_family_that_cannot_be_pruned_says_how_to_add_it(folder):
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "teacher" / "config.json").write_text(json.dumps(config | {"model_type": "megatron-bert"}))
    (line,) = faults(recipe_with(folder))
    assert "family megatron-bert" in line and "bert" in line and "FAMILIES" in line


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_without_config_or_tokenizer_is_refused(folder, missing):
    for file in (folder / "teacher").glob("vocab*"):
        file.unlink()
    (folder / "teacher" / missing).unlink()
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and missing in line


def test_a_folder_without_all_of_its_weights_is_refused(folder):
    weights = folder / "teacher" / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (b"", whole[:-10], b"version https://git-lfs.github.com/spec/v1"):
        weights.write_bytes(broken)
        (line,) = faults(recipe_with(folder))
        assert line.startswith("teacher.model: got ") and "model.safetensors is damaged" in line
    weights.unlink()
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and "model.safetensors.index.json" in line
    (folder / "teacher" / "pytorch_model.bin").write_bytes(b"")
    assert faults(recipe_with(folder)) == []


def test_sharded_weights_must_all_be_there(folder):
    load_pretrained(folder / "teacher").save_pretrained(folder / "teacher", max_shard_size="20KB")
    (folder / "teacher" / "model.safetensors").unlink(missing_ok=True)
    shards = sorted((folder / "teacher").glob("model-*.safetensors"))
    assert len(shards) > 2 and faults(recipe_with(folder)) == []
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    assert f"{shards[1].name} is damaged" in faults(recipe_with(folder))[0]
    shards[1].unlink()
    assert f"{shards[1].name} is missing" in faults(recipe_with(folder))[0]
    (folder / "teacher" / "model.safetensors.index.json").write_text("[]")
    assert "cannot be read" in faults(recipe_with(folder))[0]


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder):
    write_model(folder / "teacher", vocab=len(WORDS) - 2)
    (line,) = faults(recipe_with(folder))
    assert f"at most {len(WORDS) - 2} tokens" in line and f"has {len(WORDS)}" in line


def test_a_student_needs_the_teachers_tokenizer_and_explicit_layers(folder):
    losses = {"logits": {}, "hidden": {"layers": "lineage"}}
    student = {"student__model": str(folder / "student"), "pruning": None}
    write_model(folder / "student", layers=2)
    (line,) = faults(recipe_with(folder, **student, distillation__losses=losses))
    assert line.startswith("distillation.losses.hidden.layers: got 'lineage'")
    losses["hidden"]["layers"] = "uniform"
    assert faults(recipe_with(folder, **student, distillation__losses=losses)) == []
    write_model(folder / "student", words=[*WORDS[:-1], "other"], layers=2)
    (line,) = faults(recipe_with(folder, **student, distillation__losses=losses))
    assert line.startswith("student.model: got ") and "tokenizer" in line


def test_lineage_needs_the_teacher_that_the_student_was_pruned_from(folder):
    losses = {"logits": {}, "hidden": {"layers": "lineage"}}
    student = {"student__model": str(folder / "student"), "pruning": None, "distillation__losses": losses}
    teacher = load_pretrained(folder / "teacher")
    plan = PruningPlan("bert", tuple(LayerPlan(i, (0, 2), tuple(range(9))) for i in (0, 2)))
    shutil.copytree(folder / "teacher", folder / "student")
    prune(teacher, plan).save_pretrained(folder / "student")
    assert faults(recipe_with(folder, **student)) == []
    write_model(folder / "teacher", layers=5)
    (line,) = faults(recipe_with(folder, **student))
    assert line.startswith("distillation.losses.hidden.layers: got 'lineage'; accepted: uniform, last or pairs")


def test_a_student_with_other_label_names_is_refused_as_the_trainer_would(folder):
    def named(name, *labels):
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        write_model(folder / name, layers=2, **names)

    student = {"student__model": str(folder / "student"), "pruning": None}
    named("teacher", "neg", "pos")
    for labels in (("neg", "pos"), ("LABEL_0", "LABEL_1")):
        named("student", *labels)
        assert faults(recipe_with(folder, **student)) == []
    named("student", "hated", "loved")
    (line,) = faults(recipe_with(folder, **student))
    assert line.startswith("student.model: got ") and "['hated', 'loved']" in line and "['neg', 'pos']" in line
    with pytest.raises(InputError, match="labels"):
        shared_classes(load_pretrained(folder / "student"), load_pretrained(folder / "teacher"))
    assert faults(recipe_with(folder, **student, distillation__losses={"labels": {}})) == []
    named("teacher", "LABEL_0", "LABEL_1")
    assert faults(recipe_with(folder, **student)) == []
    trained = recipe_with(folder, **student, teacher__train={"num_train_epochs": 1})
    assert faults(trained)[0].startswith("student.model: got ")


def test_a_regression_takes_only_mse_of_the_logits(folder):
    write_model(folder / "teacher", num_labels=1)
    write_rows(folder / "rows.csv", labels=("0.5", "1.5"))
    (line,) = faults(recipe_with(folder, data__task="regression"))
    assert line.startswith("distillation.losses.logits.divergence: got 'forward_kl'")
    losses = {"logits": {"divergence": "mse"}}
    assert faults(recipe_with(folder, data__task="regression", distillation__losses=losses)) == []


def test_a_full_disk_and_an_output_that_is_a_file_are_refused(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        (line,) = faults(recipe_with(folder))
    assert line.startswith("output_dir: got ") and "GB free" in line
    needed = []
    for pruning in ({"moment_layers": 1}, {"units": ["layers"]}, {}):
        recipe, model = recipe_with(folder, pruning={"keep": 0.5, "rounds": 3, **pruning}), tiny_model()
        with monkeypatch.context() as patch, pytest.raises(InputError) as error:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            patch.setattr(model_checks, "second_moment_bytes", lambda model, inner, hidden: 5 * 10**9 * inner)
            model_checks.check_disk(recipe, model, model)
        needed.append(float(error.value.fix.split("about ")[1].split()[0]))
    assert needed[0] == needed[1] == pytest.approx(needed[2] - 15)
    (folder / "run").write_text("")
    (line,) = faults(recipe_with(folder))
    assert line.startswith("output_dir: got ") and "a new or empty folder" in line


def test_a_masked_lm_recipe_for_text_passes(folder):
    write_model(folder / "teacher", head="masked-lm")
    (folder / "text.txt").write_text("\n\n".join(["the film", "not good", "the plot", "very bad"] * 10))
    losses = {"labels": {"weight": 2}, "logits": {"weight": 5}, "hidden": {"layers": "last", "distance": "cosine"}}
    changes = {"data": {"task": "text", "path": str(folder / "text.txt"), "max_length": 16}}
    assert faults(recipe_with(folder, **changes, pruning={"layers": [0, 2]}, distillation__losses=losses)) == []


@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize("units", [["heads"], ["neurons"], ["heads", "neurons"], ["layers"]])
def test_the_least_keep_that_passes_is_the_least_that_pruning_reaches(folder, units, cost):
    model = write_and_load(folder / "teacher", layers=3)
    layers = [
        LayerPlan(i, () if "heads" in units else tuple(range(4)), () if "neurons" in units else tuple(range(64)))
        for i in range(3)
    ]
    smallest = PruningPlan("bert", tuple(layers[:1] if units == ["layers"] else layers))
    least = smallest.share(model, cost, sequence_length=8)
    pruning = {"units": units, "cost": cost, "calibration_examples": 8}
    for keep in (least, 1.01 * least):
        assert keep == 0 or faults(recipe_with(folder, pruning={**pruning, "keep": keep})) == []
    if least > 0:
        (line,) = faults(recipe_with(folder, pruning={**pruning, "keep": 0.99 * least}))
        assert line.startswith("pruning.keep: got ")
        named = float(line.split("at least ")[1].split(",")[0])
        assert least <= named < least + 1e-4
        scores = Importance("fisher", [torch.rand(4)] * 3, [torch.rand(64)] * 3, torch.rand(3))
        plan_pruning(model, scores, named, units=units, cost=cost, sequence_length=8)


def test_all_faults_of_a_pruning_section_are_told_at_once(folder):
    pruning = {"keep": 0.5, "units": ["heads", "neurons"], "round_to": 65, "min_heads": 5, "min_neurons": 65}
    lines = faults(recipe_with(folder, pruning={**pruning, "statistics": str(folder / "teacher" / "config.json")}))
    fields = ["statistics", "round_to", "min_heads", "min_neurons"]
    assert [line.partition(": got")[0] for line in lines] == [f"pruning.{name}" for name in fields]


def test_the_least_keep_of_a_pruned_teacher_is_a_share_of_what_it_has_left(folder):
    model = write_and_load(folder / "teacher", layers=2)
    plan = PruningPlan("bert", (LayerPlan(0, (0,), tuple(range(64))), LayerPlan(1, (1,), tuple(range(64)))))
    pruned = prune(model, plan)
    pruned.save_pretrained(folder / "teacher")
    bare = PruningPlan("bert", (LayerPlan(0, (), tuple(range(64))), LayerPlan(1, (), tuple(range(64)))))
    least = bare.share(pruned)
    assert least > 1.3 * bare.share(model)
    pruning = {"units": ["heads"], "calibration_examples": 8}
    assert faults(recipe_with(folder, pruning={**pruning, "keep": 1.01 * least})) == []
    assert "pruning.keep" in faults(recipe_with(folder, pruning={**pruning, "keep": 0.99 * least}))[0]


@pytest.mark.parametrize(
    ("pruning", "line"),
    [
        (
            {"keep": 0.5, "units": ["hidden", "neurons"]},
            "pruning.units: got ['hidden', 'neurons']; leave hidden out: ",
        ),
        ({"layers": [1, 2]}, "pruning.layers: got [1, 2]; keep layer 0: "),
    ],
)
def test_what_a_convolution_ties_is_refused_at_the_door(folder, pruning, line):
    write_model(folder / "teacher", family="deberta-v2", layers=3, conv_kernel_size=3)
    (found,) = faults(recipe_with(folder, pruning=pruning))
    assert found.startswith(line) and "a convolution follows the first layer" in found
    assert faults(recipe_with(folder, pruning={"layers": [0, 2]})) == []


def test_a_family_with_norms_after_attention_or_ffn_is_not_fitted_in_order(folder):
    (found,) = faults(recipe_with(folder, pruning={"keep": 0.5, "compensate": "in_order"}))
    assert found == (
        "pruning.compensate: got 'in_order'; set it to true: a norm comes after attention or FFN in bert, so that a linear "
        "cannot correct the residual stream"
    )
    write_decoder(folder / "teacher")
    assert faults(causal_recipe(folder, pruning={"keep": 0.5, "compensate": "in_order"}, student=None)) == []


def test_a_quantized_model_is_not_pruned(folder):
    file = folder / "teacher" / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantized}))
    (found,) = faults(recipe_with(folder, pruning={"layers": [0]}))
    assert found.startswith(f"teacher.model: got '{folder / 'teacher'}, quantized'; use its full-precision original")


def test_a_quantized_student_has_adapters_a_head_of_its_own_and_the_library(folder, monkeypatch):
    pytest.importorskip("peft")
    with pytest.raises(InputError, match="student.quantization: got '4bit'; add student.peft, or remove it"):
        recipe_with(folder, student={"quantization": "4bit"})
    peft = {"r": 2, "target_modules": "all-linear"}
    assert faults(recipe_with(folder, student={"quantization": "4bit", "peft": peft})) == []
    base = write_model(folder / "base", head="base")
    (found,) = faults(
        recipe_with(folder, pruning=None, student={"model": str(base), "quantization": "4bit", "peft": peft})
    )
    assert found.startswith("student.quantization: got '4bit'; remove it: ") and "new head" in found
    recipe = recipe_with(folder, student={"quantization": "4bit", "peft": peft})
    monkeypatch.setattr("distill_llm.models.quantized.importlib.util.find_spec", lambda name: None)
    (found,) = faults(recipe)
    assert found.startswith("student.quantization: got '4bit'; install bitsandbytes")


def test_paths_may_begin_with_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    recipe = recipe_with(folder, teacher__model="~/teacher", data__path="~/rows.csv", output_dir="~/run")
    assert recipe.output_dir == folder / "run"
    assert faults(recipe) == []
    (folder / "run").write_text("")
    assert faults(recipe)[0].startswith("output_dir: got ")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("task", ["text", "prompts"])
def test_recipes_for_decoders_without_a_padding_token_pass(folder, family, task):
    write_decoder(folder / "teacher", family)
    opened = open_recipe(causal_recipe(folder, task))
    assert opened.data.task.kind.name == ("causal_lm" if task == "text" else "prompts")


@pytest.mark.parametrize(
    ("task", "changes", "field", "words"),
    [
        ("text", {"data__packing": True}, "data.packing", "only prompts"),
        ("text", {"evaluation__metric": "exact_match"}, "evaluation.metric", "scored by the loss alone"),
        ("text", {"data__max_length": 65}, "data.max_length", "at most 64"),
        ("prompts", {"data__columns": {"prompt": "q"}}, "data.columns.prompt", "prompt"),
        ("prompts", {"data__columns": {"messages": "response"}}, "data.columns.messages", "chats"),
        (
            "prompts",
            {"evaluation__metric": "exact_match", "evaluation__max_new_tokens": 49},
            "evaluation.max_new_tokens",
            "at most 48",
        ),
    ],
)
def test_one_thing_wrong_for_a_decoder_gives_one_line(folder, task, changes, field, words):
    write_decoder(folder / "teacher")
    found = faults(causal_recipe(folder, task, **changes))
    assert len(found) == 1 and found[0].startswith(f"{field}: got "), found
    assert words in found[0].split("; ", 1)[1]


def test_the_last_token_that_fits_and_packing_are_accepted(folder):
    write_decoder(folder / "teacher")
    exact = {"evaluation__metric": "exact_match", "evaluation__max_new_tokens": 48}
    assert faults(causal_recipe(folder, "prompts", data__packing=True, **exact)) == []


def test_packing_is_refused_where_the_student_or_the_teacher_would_mix_the_rows(folder):
    for side, other in (("teacher", "student"), ("student", "teacher")):
        write_decoder(folder / side, "bloom")
        write_decoder(folder / other)
        recipe = causal_recipe(folder, "prompts", data__packing=True, student__model=str(folder / "student"))
        (line,) = faults(recipe)
        assert line.startswith("data.packing: got True; leave packing out: bloom mixes the sequences of a row")


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert", "mpnet"])
@pytest.mark.parametrize("pad", [0, 1])
def test_the_longest_input_is_the_longest_that_the_model_reads(family, pad):
    model = tiny_model(family, pad_token_id=pad, max_position_embeddings=20)
    longest = longest_input(model.config)
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("shorter", ["teacher", "student"])
def test_lengths_are_those_of_the_model_that_takes_fewer_tokens(folder, shorter):
    for name in ("teacher", "student"):
        write_decoder(folder / name, max_position_embeddings=48 if name == shorter else 64)
    named = {"student__model": str(folder / "student"), "evaluation__metric": "exact_match"}
    responses = "distillation__losses__responses"
    fits = {
        "evaluation__max_new_tokens": 32,
        "evaluation__latency__sequence_length": 48,
        responses: {"max_new_tokens": 32},
    }
    assert faults(causal_recipe(folder, "prompts", **named, **fits)) == []
    room = f"at most 32: {folder / shorter} takes 48 tokens"
    longest = f"at most 48, the longest input of {folder / shorter}"
    for change, field, words in (
        ({"evaluation__max_new_tokens": 33}, "evaluation.max_new_tokens", room),
        ({"evaluation__latency__sequence_length": 49}, "evaluation.latency.sequence_length", longest),
        (
            {responses: {"max_new_tokens": 33}},
            "data.max_length + distillation.losses.responses.max_new_tokens",
            longest,
        ),
    ):
        (line,) = faults(causal_recipe(folder, "prompts", **named, **{**fits, **change}))
        assert line.startswith(f"{field}: got ") and words in line
    (line,) = faults(causal_recipe(folder, "prompts", student__model=named["student__model"], data__max_length=49))
    assert line.startswith("data.max_length: got 49") and longest in line


def test_an_encoder_with_prompts_is_refused_in_one_line_trained_or_not(folder):
    for head, train in (("masked-lm", None), ("base", {"num_train_epochs": 1})):
        write_model(folder / "teacher", head=head)
        (line,) = faults(causal_recipe(folder, "prompts", teacher__train=train))
        assert line.startswith("data.task: got 'prompts'") and "bert" in line


def test_a_decoder_without_its_head_a_template_or_any_special_token_is_refused(folder):
    write_decoder(folder / "teacher")
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "teacher" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    (line,) = faults(causal_recipe(folder))
    assert line.startswith("teacher.model: got ") and "(LlamaModel)" in line and "ForCausalLM" in line
    write_decoder(folder / "teacher", tokenizer=word_tokenizer(eos_token=None, bos_token=None))
    (line,) = faults(causal_recipe(folder, "prompts"))
    assert line.startswith("teacher.model: got ") and "EOS or BOS" in line
    write_decoder(folder / "teacher")
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    (folder / "talk.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 40))
    (line,) = faults(causal_recipe(folder, "prompts", data__path=str(folder / "talk.jsonl")))
    assert line.startswith("teacher.model: got ") and "chat template" in line


def test_names_in_capitals_are_the_same_names(folder):
    names = {"id2label": {0: "NEG", 1: "POS"}, "label2id": {"NEG": 0, "POS": 1}}
    write_model(folder / "student", layers=2, **names)
    trained = {"student__model": str(folder / "student"), "pruning": None, "teacher__train": {"max_steps": 1}}
    assert faults(recipe_with(folder, **trained)) == []
