"""What is tried at the door on models without memory: adapters, signals and room on the disk, of the model that learns."""

import re
import shutil
from collections import namedtuple
from contextlib import contextmanager

import pytest
from builders.recipes import causal_recipe, recipe_with, write_decoder, write_model, write_rows
from builders.recipes import faults_at_the_door as faults

from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan


@pytest.fixture
def folder(tmp_path):
    """A folder with a teacher and rows that fit the recipe of `recipe_for`."""
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    return tmp_path


@contextmanager
def free_bytes(monkeypatch, count):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(0, 0, count))
        yield


def bytes_of(folder):
    return sum(4 * parameter.numel() for parameter in load_pretrained(folder).parameters())


def fits_in(monkeypatch, recipe, count):
    """Whether a recipe passes with so many bytes free; what it wants otherwise is room on the disk."""
    with free_bytes(monkeypatch, count):
        found = faults(recipe)
    assert all(line.startswith("output_dir: got ") and "GB free" in line for line in found)
    return not found


@pytest.mark.parametrize(
    ("teacher", "student", "changes", "copies"),
    [  # copies of teacher and student: those that stay, and two checkpoints with weights and two moments each
        (20, 1, {}, (0, 2 + 6)),
        (1, 3, {}, (0, 2 + 6)),
        (3, 1, {"teacher__train": {"num_train_epochs": 1}}, (1 + 6, 2)),
        (2, None, {"pruning": {"keep": 0.5, "compensate": False, "rounds": 3}}, (7 + 6, 0)),
        (2, None, {"pruning": {"keep": 0.5, "compensate": False}, "distillation": None}, (2, 0)),
    ],
)
def test_the_disk_has_room_for_what_the_run_itself_writes(folder, monkeypatch, teacher, student, changes, copies):
    write_model(folder / "teacher", layers=teacher)
    if student is not None:
        write_model(folder / "student", layers=student)
        changes = {"student__model": str(folder / "student"), "pruning": None, **changes}
    recipe = recipe_with(folder, **changes)
    sizes = [bytes_of(folder / name) for name in ("teacher", "student") if (folder / name).exists()]
    needed = sum(count * size for count, size in zip(copies, sizes, strict=False))
    assert fits_in(monkeypatch, recipe, needed)
    assert not fits_in(monkeypatch, recipe, needed - 1)


def test_adapters_need_peft(folder, monkeypatch):
    monkeypatch.setattr("distill_llm.checks.models.find_spec", lambda name: None)
    student = {"model": str(folder / "teacher"), "peft": {"r": 2, "target_modules": ["query"]}}
    (line,) = faults(recipe_with(folder, pruning=None, student=student))
    assert line.startswith("student.peft: got {") and "pip install 'distill_llm[peft]'" in line


def test_checkpoints_of_adapters_hold_adapters(folder, monkeypatch):
    student = {"model": str(folder / "teacher"), "peft": {"r": 2, "target_modules": ["query"]}}
    recipe = recipe_with(folder, student=student, pruning=None)
    adapters = 4 * 3 * 2 * (32 + 32)
    needed = 2 * (bytes_of(folder / "teacher") + adapters) + 6 * adapters
    assert fits_in(monkeypatch, recipe, needed) and not fits_in(monkeypatch, recipe, needed - 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
        {"target_modules": ["lm_head"]},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    ],
)
def test_adapters_are_tried_on_the_model_with_its_head(folder, fields):
    write_decoder(folder / "teacher")
    assert faults(causal_recipe(folder, student__peft=fields)) == []
    pruned = {"pruning": {"keep": 0.5}, "student__model": None}
    assert faults(causal_recipe(folder, **pruned, student__peft=fields)) == []
    (line,) = faults(causal_recipe(folder, student__peft={**fields, "target_modules": ["query"]}))
    assert line.startswith("student.peft: got ") and "query" in line


def test_adapters_are_tried_on_the_student_that_learns(folder):
    write_model(folder / "student", family="distilbert", layers=2)
    for own, others in (("student", "teacher"), ("teacher", "student")):
        changes = {"teacher__model": str(folder / others), "student__model": str(folder / own), "pruning": None}
        linear = "q_lin" if own == "student" else "query"
        fields = {"target_modules": [linear], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
        assert faults(recipe_with(folder, **changes, student__peft=fields)) == []
        fields["target_modules"] = ["query" if own == "student" else "q_lin"]
        (line,) = faults(recipe_with(folder, **changes, student__peft=fields))
        assert line.startswith("student.peft: got ")


def test_adapters_fit_a_student_that_was_pruned_before(folder):
    write_decoder(folder / "teacher")
    shutil.copytree(folder / "teacher", folder / "student")
    plan = PruningPlan("llama", tuple(LayerPlan(i, (1,), tuple(range(9))) for i in range(2)))
    prune(load_pretrained(folder / "teacher"), plan).save_pretrained(folder / "student")
    fields = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    assert faults(causal_recipe(folder, student__model=str(folder / "student"), student__peft=fields)) == []


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_adapters_on_tied_weights_are_refused_and_copies_to_save_are_not(folder, module):
    write_decoder(folder / "teacher", tie_word_embeddings=True)
    fields = {"target_modules": ["q_proj", module], "task_type": "CAUSAL_LM"}
    (line,) = faults(causal_recipe(folder, student__peft=fields))
    assert line.startswith(f"student.peft.target_modules: got '{module}'; accepted: ") and "modules_to_save" in line
    saved = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    assert faults(causal_recipe(folder, student__peft=saved)) == []
    assert faults(causal_recipe(folder, student__peft={"target_modules": ["q_proj"]})) == []
    write_decoder(folder / "teacher", tie_word_embeddings=False)
    assert faults(causal_recipe(folder, student__peft=fields)) == []


@pytest.mark.grid(1)
@pytest.mark.parametrize("side", ["teacher", "student", "pruned"])
@pytest.mark.parametrize("family", ["gemma2", "bloom", "mpnet", "deberta-v2", "llama", "gpt2", "distilbert"])
def test_attention_that_cannot_be_seen_is_refused_before_anything_is_pruned_or_trained(folder, family, side):
    other, encoder = ("bert", True) if family in ("mpnet", "deberta-v2", "distilbert") else ("llama", False)
    for name in ("teacher", "student"):
        chosen = family if name == side or side == "pruned" else other
        write_model(folder / name, family=chosen) if encoder else write_decoder(folder / name, chosen)
    changes = {"pruning": {"keep": 0.9}} if side == "pruned" else {"pruning": None}
    changes |= {"student__model": None if side == "pruned" else str(folder / "student")}
    make = recipe_with if encoder else causal_recipe
    for term in ("attention", "relations"):
        found = faults(make(folder, **changes, distillation__losses={term: {"layers": "last"}}))
        seen = family in ("llama", "gpt2", "distilbert") or (family == "gemma2" and term == "relations")
        words = "softcap" if family == "gemma2" else "not seen"
        assert (found == []) == seen, found
        assert seen or (found[0].startswith(f"distillation.losses.{term}: got ") and words in found[0])
        assert len(found) <= 1


def test_relation_heads_are_checked_against_both_models_and_left_out_they_are_those_that_fit(folder):
    write_decoder(folder / "teacher")
    write_decoder(folder / "student", hidden_size=24, head_dim=6)
    given = {"student__model": str(folder / "student")}
    field = "distillation.losses.relations.heads"
    for heads, accepted in ((None, None), (4, None), (8, "12, 16, 24, 32: 1, 2, 4$"), (5, "12, 16, 24, 32: 1, 2, 4$")):
        found = faults(causal_recipe(folder, **given, distillation__losses={"relations": {"heads": heads}}))
        assert len(found) == (accepted is not None)
        assert not found or re.match(rf"{field}: got {heads}; accepted: a divisor of the widths {accepted}", found[0])
    pruned = {"student__model": None, "distillation__losses": {"relations": {"heads": 16}}}
    assert faults(causal_recipe(folder, **pruned, pruning={"keep": 0.9, "units": ["neurons"]})) == []
    (line,) = faults(causal_recipe(folder, **pruned, pruning={"keep": 0.9}))
    assert line.startswith(f"{field}: got 16; leave it out, or give a divisor of 8, the size of a head")
    pruned["distillation__losses"] = {"relations": {"heads": 12}}
    (line,) = faults(causal_recipe(folder, **pruned, pruning={"layers": [0]}))
    assert line.startswith(f"{field}: got 12; accepted: a divisor of the widths 16, 32: ")


def test_a_pruned_teacher_with_a_layer_without_heads_can_be_pruned_again(folder):
    write_decoder(folder / "teacher")
    rows = tuple(LayerPlan(i, (0,) if i else (), tuple(range(64))) for i in range(2))
    prune(load_pretrained(folder / "teacher"), PruningPlan("llama", rows)).save_pretrained(folder / "teacher")
    changes = {"student__model": None, "pruning": {"keep": 0.9}}
    for term in ("attention", "relations"):
        assert faults(causal_recipe(folder, **changes, distillation__losses={term: {"layers": "lineage"}})) == []


def test_a_mixture_that_a_run_trains_must_not_ask_for_a_loss_of_its_router(tmp_path):
    student = {"student__model": str(tmp_path / "student")}
    trained = {**student, "teacher__train": {"max_steps": 1}}
    write_decoder(tmp_path / "student")
    for asks, refused in ((True, ["student", None, "teacher"]), (False, [None, None, None])):
        write_decoder(tmp_path / "teacher", "mixtral", num_local_experts=2, output_router_logits=asks)
        for changes, which in zip(({}, student, trained), refused, strict=True):
            found = faults(causal_recipe(tmp_path, **changes))
            line = f"{which}.model: config.json.output_router_logits: got True; set it to false: "
            assert [each[: len(line)] for each in found] == ([line] if which else []), found
