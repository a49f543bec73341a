"""Runs without data: every way of making rows trains a student, stops and goes on with the same bits, and says what it did."""

import json
import re
from pathlib import Path

import pytest
import yaml
from builders.causal import word_tokenizer
from builders.recipes import faults_at_the_door, recipe_for, write_decoder, write_model, write_rows
from builders.runs import same, weights
from datasets import load_from_disk

import distill_llm
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pipeline.checkpoints import MarkComplete
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.synthesis.rows import RowMaker

NAMES = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
TRAINING = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "use_cpu": True}
METHODS = {
    "noise": {"steps": 3, "batch_size": 5},
    "inversion": {"steps": 3, "batch_size": 5},
    "generator": {"batch_size": 4, "warmup_steps": 2, "every": 2},
    "sampled": {"batch_size": 5},
}


def recipe_without_data(folder, method, **changes):
    """A recipe whose rows are made by a method; the tiny models are written first."""
    write_model(folder / "teacher", max_position_embeddings=64, **NAMES)
    write_model(folder / "masked", head="masked-lm", max_position_embeddings=64)
    settings = dict(METHODS[method])
    if method == "sampled":
        settings["model"] = str(folder / "masked")
    synthetic = {"examples": 12, "test_examples": 6, "length": 8, method: settings}
    sections = {
        "data": {"task": "synthetic", "max_length": 16, "synthetic": synthetic},
        "distillation": {"losses": {"logits": {}, "hidden": {}}, **TRAINING},
        "report": {"latency_grid": False, "examples": 2},
        **changes,
    }
    return recipe_for(folder, **sections)


def real_rows(folder):
    """The section data.test for rows in a file."""
    write_rows(folder / "rows.csv")
    columns = {"text": "review", "label": "mood"}
    return {"task": "classification", "path": str(folder / "rows.csv"), "columns": columns}


def stopped_while_rows_are_made(monkeypatch, recipe, folder, parts):
    """Stops a run when it has made so many parts of its rows."""
    made = []
    with monkeypatch.context() as stop:
        for kind in RowMaker.__subclasses__():

            def rows(self, numbers, own=kind.rows):
                if len(made) == parts:
                    raise KeyboardInterrupt
                made.append(numbers)
                return own(self, numbers)

            stop.setattr(kind, "rows", rows)
        with pytest.raises(KeyboardInterrupt):
            distill_llm.run(recipe, folder)


def stopped_while_it_trains(monkeypatch, recipe, folder, steps):
    """Stops a run after so many steps of a recovery."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as stop:
        stop.setattr(MarkComplete, "on_step_end", on_step_end, raising=False)
        with pytest.raises(KeyboardInterrupt):
            distill_llm.run(recipe, folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_without_data_and_a_stopped_run_ends_with_the_same_bits(method, tmp_path, monkeypatch):
    recipe = recipe_without_data(tmp_path, method)
    result = distill_llm.run(recipe, tmp_path / "whole")
    made = result.metrics["synthetic"]
    assert (made["method"], made["rows"], sum(made["classes"].values())) == (method, {"train": 12, "test": 6}, 12)
    assert result.metrics["metric"] == "agreement" and result.metrics["teacher"]["score"] == 1.0
    assert result.metrics["student"]["rows"] == 6
    for file in (result.report, result.student_dir / "README.md", result.page):
        assert "agreement with the teacher on 6 further rows, not on real ones" in file.read_text()
    assert not same(weights(tmp_path / "whole" / "round-1" / "pruned"), weights(result.student_dir))

    stopped = tmp_path / "stopped"
    stopped_while_rows_are_made(monkeypatch, recipe, stopped, 2)
    assert len(list((stopped / "synthetic-parts").iterdir())) == 2
    stopped_while_it_trains(monkeypatch, recipe, stopped, 3)
    assert (stopped / "round-1" / "student-training" / "checkpoint-2").is_dir()
    assert not (stopped / "synthetic-parts").exists()
    again = distill_llm.run(recipe, stopped)
    assert same(weights(again.student_dir), weights(result.student_dir))


@pytest.mark.slow
def test_real_rows_are_scored_where_they_are_named_and_labels_are_the_teachers_own(tmp_path):
    recipe = recipe_without_data(tmp_path, "noise")
    recipe["data"]["test"] = real_rows(tmp_path)
    recipe["distillation"]["losses"] = {"labels": {}, "logits": {}}
    result = distill_llm.run(recipe, tmp_path / "run")
    assert (result.metrics["task"], result.metrics["metric"]) == ("classification", "accuracy")
    assert result.metrics["student"]["rows"] == 4  # a tenth of each class of the rows, as without synthetic ones
    assert "Scores are of real rows." in result.report.read_text()
    made = load_from_disk(str(tmp_path / "run" / "synthetic" / "train")).with_format("torch")
    teacher = load_pretrained(tmp_path / "teacher").eval()
    assert teacher(inputs_embeds=made["inputs_embeds"][:]).logits.argmax(-1).tolist() == made["labels"][:].tolist()
    assert json.loads((tmp_path / "run" / "synthetic" / "synthetic.json").read_text())["seed"] == 0
    assert not (tmp_path / "run" / "synthetic" / "test").exists()


@pytest.mark.slow
def test_a_language_model_learns_from_its_teachers_own_text(tmp_path):
    write_decoder(tmp_path / "teacher", tokenizer=word_tokenizer())
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw3\n")
    sampled = {"prompts": str(tmp_path / "prompts.txt"), "batch_size": 5}
    data = {"task": "synthetic", "max_length": 16}
    data["synthetic"] = {"examples": 12, "test_examples": 4, "length": 12, "sampled": sampled}
    recipe = recipe_without_data_of(tmp_path, data)
    result = distill_llm.run(recipe, tmp_path / "run")
    rows = load_from_disk(str(tmp_path / "run" / "synthetic" / "train"))
    begins = [word_tokenizer()(text)["input_ids"] for text in ("w1 w2", "w3")]
    for number, ids in enumerate(rows["input_ids"]):
        begin = begins[number % 2]
        assert ids[: len(begin)] == begin and len(begin) < len(ids) <= 12
    assert rows["labels"][:] == rows["input_ids"][:]
    assert result.metrics["metric"] == "perplexity" and "were made, not of real ones" in result.report.read_text()


def recipe_without_data_of(folder, data):
    """A recipe around a decoder that is there already."""
    training = {"losses": {"logits": {}}, **TRAINING}
    sections = {"data": data, "distillation": training, "report": {"latency_grid": False, "examples": 0}}
    return recipe_for(folder, **sections)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, change, line",
    [
        ("noise", {"pruning.units": ["heads", "hidden"]}, "pruning.units: got .*remove hidden, or use sampled"),
        ("noise", {"teacher.train": {"max_steps": 1}}, "teacher.train: .*there are no rows to train the teacher on"),
        ("noise", {"data.augment": {"cutout": {}}}, "data.augment: .*rows of embeddings have no words"),
        ("noise", {"data.synthetic.length": 65}, "data.synthetic.length: got 65; accepted: at most 64"),
        ("noise", {"pruning.calibration_examples": 13}, "pruning.calibration_examples: got 13; accepted: at most 12"),
        ("noise", {"evaluation.metric": "f1"}, "evaluation.metric: got 'f1'; leave it out, or name real rows"),
        ("noise", {"data.test": {"task": "classification"}}, "data.test.path: not given; accepted: a file, a folder"),
        ("noise", {"data.test": {"task": "synthetic"}}, "data.test.task: got 'synthetic'"),
        ("generator", {"distillation.losses": {"labels": {}}}, "distillation.losses.labels: .*have no labels"),
        ("generator", {"distillation.losses": {"adadistill": {}}}, "distillation.losses.adadistill: .*have no labels"),
        (
            "generator",
            {"distillation.losses": {"logits": {"divergence": "dkd"}}},
            "distillation.losses.logits.divergence: got 'dkd'; set another one: rows of a generator have no labels",
        ),
        ("generator", {"distillation.losses": {"labels": {}}}, "distillation.losses: .*add a term that compares"),
        ("generator", {"distillation.generations": 2}, "distillation.generations: .*plays against teacher.model"),
        ("generator", {"teacher.moving_average": {}}, "teacher.moving_average: .*plays against teacher.model"),
        ("noise", {"teacher.peers": {"others": [{"keep": 0.4}]}}, "teacher.peers: .*embeddings of another width"),
        ("sampled", {"data.synthetic.sampled.top_k": 5}, "data.synthetic.sampled.top_k: got 5; .*a masked LM does not"),
        ("generator", {"distillation": None}, "data.synthetic.generator: .*add a distillation section"),
        (
            "sampled",
            {"data.synthetic.sampled": {}},
            "data.synthetic.sampled.model: not given; name a causal or masked LM",
        ),
        ("sampled", {"data.synthetic.sampled.model": "TEACHER"}, "data.synthetic.sampled.model: .*a language model"),
        ("sampled", {"data.synthetic.sampled.prompts": "none.txt"}, "data.synthetic.sampled.prompts: .*fills texts"),
        ("sampled", {"data.synthetic.length": 17}, r"data.synthetic.length: got 17; accepted: at most data.max_length"),
    ],
)
def test_what_does_not_go_is_said_in_a_line_before_any_work(method, change, line, tmp_path):
    recipe = recipe_without_data(tmp_path, method)
    recipe["data"] = json.loads(json.dumps(recipe["data"]))
    for path, value in change.items():
        inner, *names = recipe, *path.split(".")
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = str(tmp_path / "teacher") if value == "TEACHER" else value
    lines = faults_at_the_door(parse_recipe(recipe))
    assert any(re.match(line, each) for each in lines), lines
    assert all(len(each) <= 300 and "\n" not in each for each in lines)


HEADS = {"token": {"head": "token-classification"}, "value": {"num_labels": 1, "id2label": {0: "value"}}}


@pytest.mark.parametrize("method", ["noise", "sampled"])
@pytest.mark.parametrize("head", HEADS)
def test_a_teacher_of_tokens_or_of_a_value_needs_real_rows(method, head, tmp_path):
    recipe = recipe_without_data(tmp_path, method)
    write_model(tmp_path / "teacher", **{"max_position_embeddings": 64, **HEADS[head]})
    line = "teacher.model: got .*; accepted: a classifier of texts with two classes or more, or a language model"
    lines = faults_at_the_door(parse_recipe(recipe))
    assert any(re.match(line, each) for each in lines), lines
    assert all(len(each) <= 300 and "\n" not in each for each in lines)


@pytest.mark.parametrize(
    "method, task, line",
    [
        (
            "sampled",
            "pairs",
            "data.synthetic.sampled: .*make rows in another way, such as noise: .*these rows are pairs",
        ),
        ("noise", "pairs", None),
        *(
            (method, "regression", "data.test.task: got 'regression'; accepted: a task of classes")
            for method in METHODS
        ),
        *((method, "prompts", "data.test.task: got 'prompts'; accepted: a task of classes") for method in METHODS),
        ("sampled", "token_classification", "data.test.task: .*token classification is not supported"),
        ("noise", "token_classification", "data.test.task: .*token classification is not supported"),
    ],
)
def test_real_rows_to_score_on_must_be_of_a_task_that_rows_can_be_made_for(method, task, line, tmp_path):
    recipe = recipe_without_data(tmp_path, method)
    file = tmp_path / "rows.csv"
    file.write_text("a,b,y\n" + "".join(f"the film {row},the film,{row % 2}\n" for row in range(40)))
    columns = {"text": "a", "label": "y"}
    if task == "pairs":
        columns["text_pair"] = "b"
    elif task == "regression":
        write_model(tmp_path / "teacher", max_position_embeddings=64, num_labels=1)
    elif task == "prompts":
        write_decoder(tmp_path / "teacher", tokenizer=word_tokenizer())
        columns = {"prompt": "a", "response": "b"}
    test = {"task": "classification" if task == "pairs" else task, "path": str(file), "columns": columns}
    recipe["data"] = {**recipe["data"], "test": test}
    lines = faults_at_the_door(parse_recipe(recipe))
    assert any(re.match(line, each) for each in lines) if line else not lines, lines
    assert all(len(each) <= 300 and "\n" not in each for each in lines)


@pytest.mark.parametrize(
    "data, line",
    [
        ({"task": "synthetic"}, "data.synthetic: not given; say how the rows are made"),
        ({"task": "sst2", "synthetic": {"noise": {}}}, "data.synthetic: .*set data.task to synthetic"),
        ({"task": "sst2", "test": {"task": "sst2"}}, "data.test: .*set data.task to synthetic"),
        ({"task": "synthetic", "path": "x", "synthetic": {"noise": {}}}, "data.path: got 'x'; remove it"),
        (
            {"task": "synthetic", "synthetic": {}},
            "data.synthetic: .*exactly one of generator, inversion, noise, sampled",
        ),
        ({"task": "synthetic", "synthetic": {"noise": {}, "sampled": {}}}, "data.synthetic: .*exactly one of"),
    ],
)
def test_a_recipe_says_how_rows_are_made_or_names_real_ones(data, line, tmp_path):
    with pytest.raises(distill_llm.common.errors.InputError) as error:
        parse_recipe(recipe_for(tmp_path, data=data))
    assert re.match(line, str(error.value)), str(error.value)


def test_a_teacher_that_keeps_its_tokenizer_needs_real_rows(tmp_path):
    training = {"losses": {"cross_tokenizer": {}}, "max_steps": 1}
    data = {"task": "synthetic", "synthetic": {"sampled": {}}}
    recipe = recipe_for(tmp_path, data=data, distillation=training, student={"model": "student"})
    recipe = {**recipe, "teacher": {**recipe["teacher"], "tokenizer": "own"}, "pruning": None}
    with pytest.raises(distill_llm.common.errors.InputError) as error:
        parse_recipe(recipe)
    assert str(error.value).startswith("teacher.tokenizer: got 'own'; remove it, or data.synthetic: rows that are made")


def test_the_recipes_of_the_page_are_recipes():
    text = (Path(__file__).parents[2] / "docs" / "methods" / "no_data.md").read_text()
    first, second = (yaml.safe_load(each) for each in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    recipe = parse_recipe(first)
    assert recipe.data.synthetic.method == "inversion" and recipe.data.test.task == "sst2"
    assert parse_recipe({**first, **second}).data.synthetic.sampled.temperature == 1.0
