"""`shrink` and `init`: a recipe made for a model and data, that `run` carries out."""

import json

import pytest
from builders.causal import word_tokenizer
from builders.recipes import write_decoder, write_model, write_rows
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.drafting.draft import Wish, draft
from distill_llm.drafting.model import facts_of_model
from distill_llm.drafting.target import Target, cut_for
from distill_llm.recipe.recipe import load_recipe

SHRINK = ["shrink", "teacher", "--data", "rows.csv"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a fine-tuned teacher and rows."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    return tmp_path


@pytest.fixture
def carried_out(monkeypatch):
    """The recipes that would have been carried out."""
    seen = []
    monkeypatch.setattr("distill_llm.cli.shrink.carry_out", lambda recipe, *_: seen.append(recipe))
    return seen


def call(*words: str):
    return CliRunner().invoke(app, list(words))


def test_shrink_saves_and_names_its_recipe_and_the_same_command_goes_on_with_it(folder, carried_out):
    for _ in range(2):
        result = call(*SHRINK, "--speedup", "2")
        assert result.exit_code == 0, result.output
    first, second = carried_out
    file = folder / "runs" / "teacher-rows.yaml"
    assert first == second == load_recipe(file)
    assert "recipe:  runs/teacher-rows.yaml" in result.stdout
    assert (first.pruning.keep, first.pruning.cost, first.data.task) == (0.5, "latency", "classification")
    assert first.data.columns.model_dump(exclude_none=True) == {"text": "review", "label": "mood"}
    assert first.teacher.train is None, "it has the head already"
    assert "shrink teacher --data rows.csv --speedup 2" in file.read_text()
    refused = call(*SHRINK, "--speedup", "3")
    assert refused.exit_code == 2 and "another recipe" in refused.stderr and len(carried_out) == 2


def test_init_writes_the_same_recipe_and_carries_nothing_out(folder, carried_out):
    assert call("init", "teacher", "--data", "rows.csv", "--keep", "0.4").exit_code == 0
    assert call(*SHRINK, "--keep", "0.4").exit_code == 0
    (carried,) = carried_out
    written = load_recipe("recipe.yaml")
    assert written == carried and written.pruning.keep == 0.4
    assert call("init", "--output", "starter.yaml").exit_code == 0
    assert load_recipe("starter.yaml").teacher.model == "my-org/my-fine-tuned-model"
    assert sum("#" in line for line in (folder / "starter.yaml").read_text().splitlines()) > 5


@pytest.mark.parametrize(
    ("words", "begin"),
    [
        (["shrink", "teacher"], "--data: not given; give a file"),
        ([*SHRINK, "--speedup", "0.5"], "--speedup: got 0.5; accepted: a number above 1"),
        ([*SHRINK, "--keep", "0.5", "--memory", "1GB"], "--keep: got 0.5; give only one of --keep and --memory"),
        ([*SHRINK, "--speedup", "200"], "--speedup: got 200.0; accepted: a number above 1 and at most 50"),
        ([*SHRINK, "--memory", "8 apples"], "--memory: got '8 apples'; accepted: "),
        ([*SHRINK, "--memory", "8GB"], "--memory: got '8GB'; ask for less: the model takes "),
        ([*SHRINK, "--text", "revue"], "--text: got 'revue'; accepted: one of review, mood"),
        ([*SHRINK, "--text", "review", "--columns", "text=review"], "--text: got 'review'; leave it out"),
        (["init", "--keep", "0.5"], "MODEL: not given; name the model"),
    ],
)
def test_what_is_wrong_is_one_line_named_by_its_option(folder, carried_out, words, begin):
    result = call(*words)
    assert result.exit_code == 2 and not carried_out and not (folder / "runs").exists()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.removeprefix("error: ").startswith(begin)


def test_what_was_only_looked_at_or_refused_leaves_no_recipe_behind(folder, monkeypatch):
    seen = []

    def refuse(recipe, teller, dry_run=False):
        seen.append(recipe.pruning.keep)
        if not dry_run:
            raise InputError("teacher.model", "teacher", "another one")

    monkeypatch.setattr("distill_llm.cli.shrink.carry_out", refuse)
    assert call(*SHRINK, "--keep", "0.4", "--dry-run").exit_code == 0
    assert not (folder / "runs/teacher-rows.yaml").exists()
    assert call(*SHRINK, "--keep", "0.5").exit_code == 2
    assert seen == [0.4, 0.5] and not (folder / "runs/teacher-rows.yaml").exists()
    call("init", "teacher", "--data", "rows.csv", "--keep", "0.5", "--output", "runs/teacher-rows.yaml")
    assert call(*SHRINK, "--keep", "0.5").exit_code == 2
    assert (folder / "runs/teacher-rows.yaml").exists(), "an older file stays"


def test_memory_is_that_of_all_weights(folder):
    facts = facts_of_model("teacher")
    layers = sum(each.numel() for each in facts.bare.encoder.layer.parameters()) * 4
    whole = sum(each.numel() for each in facts.bare.parameters()) * 4
    wanted = whole - layers // 2
    cut, _ = cut_for(Target(memory=f"{wanted / 1e6}MB"), facts, 16)
    assert cut["cost"] == "memory" and cut["keep"] == pytest.approx(0.5, abs=2e-3)


def test_length_is_what_the_rows_need_and_a_base_model_is_tuned_first(folder):
    config = json.loads((folder / "teacher/config.json").read_text())
    (folder / "teacher/config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    made = draft(Wish("teacher", "rows.csv"))
    assert made.recipe["data"]["max_length"] == 16, "the film N, with special tokens"
    assert made.recipe["teacher"]["train"]["num_train_epochs"] >= 2
    assert "fine-tuned first" in " ".join(made.said)
    assert "train" in draft(Wish("teacher", "rows.csv", task="text", columns={"text": "review"})).recipe["teacher"]


def test_length_counts_what_a_chat_template_adds(folder):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }} w1 w1 w1 w1 w1 w1 w1 w1 {{ turn.content }} {% endfor %}"
    )
    write_decoder(folder / "llm", tokenizer=tokenizer)
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i}", "response": "w2"}) for i in range(40)))
    data = draft(Wish("llm", "chats.jsonl")).recipe["data"]
    assert data["chat"] and data["max_length"] == 32, "2 turns of 10 words, not 2 words"


def test_env_says_what_a_bug_report_needs():
    result = call("env")
    assert result.exit_code == 0
    for name in ("distill_llm", "Python", "torch", "transformers", "cores", "memory", "devices"):
        assert f"- {name}: " in result.stdout


@pytest.mark.slow
def test_shrink_makes_a_student_from_start_to_end(folder):
    result = call(*SHRINK, "--keep", "0.5", "--json")
    assert result.exit_code == 0, result.output
    *stages, end = map(json.loads, result.stdout.splitlines())
    assert [each["before"] for each in stages] == [False] * 4 and end["student"] == "runs/teacher-rows/student"
    assert (folder / "runs/teacher-rows/student/config.json").is_file()
