"""The command line: exit codes, one line per fault, nothing written on bad input, and what commands hand on."""

import json
import os
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from builders.disks import fill_disk
from builders.recipes import recipe_for, write_model, write_recipe, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging
from typer.testing import CliRunner

from distill_llm.architectures.families import FAMILIES
from distill_llm.checks.recipe import open_recipe
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError, InputErrors
from distill_llm.common.outputs import usable_output
from distill_llm.data import DataSpec, load_task
from distill_llm.recipe.recipe import Recipe, load_recipe, recipe_folder, recipe_names

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]

EVALUATE = [
    "evaluate",
    "teacher",
    "--task",
    "classification",
    "--data",
    "rows.csv",
    "--columns",
    "text=review,label=mood",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a teacher, rows and a recipe for them."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher", max_position_embeddings=160)
    write_rows(tmp_path / "rows.csv")
    write_recipe(tmp_path, recipe_for(tmp_path))
    return tmp_path


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Calls of a pipeline that only checks its recipe, in the place of the real one."""
    for name, code in (("student", {}), ("pruned", {"auto_map": {"AutoModel": "modeling_pruned.PrunedBertModel"}})):
        (tmp_path / name).mkdir()
        config = {"architectures": ["BertForSequenceClassification"], **code}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    seen: list = []
    fake = types.ModuleType("distill_llm.pipeline.run")
    result = types.SimpleNamespace(
        metrics={}, student_dir=Path("student"), report=Path("report.md"), page=Path("report.html")
    )
    fake.run = lambda recipe, output_dir, _: open_recipe(recipe) and (seen.append((recipe, output_dir)) or result)
    fake.prune_recipe = lambda recipe: usable_output(recipe.output_dir) or seen.append(recipe) or Path("pruned")
    monkeypatch.setitem(sys.modules, "distill_llm.pipeline.run", fake)
    monkeypatch.setattr("distill_llm.pipeline.run", fake, raising=False)  # another test may have imported the real one
    return seen


def call(*args: str):
    """The result of the command line."""
    return CliRunner().invoke(app, list(args))


def refused(*args: str) -> list[str]:
    """The lines on stderr of a command that must be refused."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), result.stderr
    return [line.removeprefix("error: ") for line in lines]


def python(*args: str) -> subprocess.CompletedProcess:
    """A fresh Python that finds the package."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f": distill-llm {command}" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("setting", "field", "given", "accepted"),
    [
        ("pruning.keep=1.7", "pruning.keep", "1.7", "at most 1"),
        ("pruning.kep=0.5", "pruning.kep", "0.5", "'keep' (the nearest)"),
        ("pruning.rounds=0", "pruning.rounds", "0", "at least 1"),
        ("pruning.keep=half", "pruning.keep", "'half'", "a number"),
        ("distillation.losses.logits.temperature=-1", "distillation.losses.logits.temperature", "-1", "above 0"),
        ("data.task=sst3", "data.task", "'sst3'", "'sst2' (the nearest)"),
        ("data.path=no/such/folder", "data.path", "'no/such/folder'", "existing"),
        ("data.columns.text=revue", "data.columns.text", "'revue'", "review"),
        ("teacher.model=no/such/folder", "teacher.model", "'no/such/folder'", "existing folder"),
    ],
)
def test_bad_input_exits_with_2_and_one_line_and_writes_nothing(folder, calls, setting, field, given, accepted):
    before = sorted(folder.rglob("*"))
    (line,) = refused("run", "recipe.yaml", "--set", setting)
    assert line.startswith(f"{field}: got {given}; accepted: ") and accepted in line
    assert sorted(folder.rglob("*")) == before and not calls


def test_labels_that_do_not_match_and_a_family_that_cannot_be_pruned_exit_with_2(folder, calls):
    write_rows(folder / "rows.csv", labels=("a", "b", "c"))
    config = folder / "teacher" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "bert"', '"model_type": "megatron-bert"'))
    labels, family = refused("run", "recipe.yaml")
    assert "with 2 labels" in labels and "family megatron-bert" in family
    assert not calls and not (folder / "run").exists()


def test_usage_errors_are_one_line_too(folder):
    assert "keep" in refused("prune", "teacher", "--task", "sst2", "--output-dir", "x")[0]
    assert "'rnu'" in refused("rnu")[0]
    assert refused("run", "quickstat")[0].startswith("RECIPE: got 'quickstat'; accepted: ")
    for args in (["recipe.yaml", "--set", "pruning.keep", "0.4"], ["--set", "pruning.keep", "0.4", "recipe.yaml"]):
        (line,) = refused("run", *args)
        assert "--set pruning.keep=VALUE" in line
    assert "--set" not in refused("run", "recipe.yaml", "more")[0]
    assert "--quite" in refused("--quite", "recipes")[0]


def test_the_version_is_that_of_the_package():
    assert call("--version").stdout == f"distill_llm {version('distill_llm')}\n"


def test_run_hands_the_recipe_with_overrides_to_the_pipeline(folder, calls):
    logging.enable_progress_bar()
    result = call("run", "recipe.yaml", "--set", "pruning.keep=0.25", "--output-dir", "elsewhere")
    assert result.exit_code == 0, result.output
    assert not logging.is_progress_bar_enabled(), "of loading and saving weights"
    ((recipe, output_dir),) = calls
    assert isinstance(recipe, Recipe) and recipe.pruning.keep == 0.25
    assert output_dir == recipe.output_dir == Path("elsewhere")
    assert "report.html" in result.stdout
    assert 'from_pretrained("student"): a stock transformers model\n' in result.stdout
    assert result.stdout.endswith("student: student\n")


def test_distill_leaves_pruning_out_and_takes_the_student(folder, calls):
    write_model(folder / "student", layers=1)
    result = call("distill", "recipe.yaml", "--student", "student")
    assert result.exit_code == 0, result.output
    assert calls[0][0].pruning is None and calls[0][0].student.model == "student"
    own = load_recipe("recipe.yaml").output_dir
    assert calls[0][1] == own.with_name(f"{own.name}-distilled"), "beside the run that the recipe itself makes"
    for chosen in (["--output-dir", "elsewhere"], ["--set", "output_dir=elsewhere"]):
        assert call("distill", "recipe.yaml", "--student", "student", *chosen).exit_code == 0
        assert calls[-1][1] == Path("elsewhere")
    (line,) = refused("distill", "recipe.yaml")
    assert line.startswith("--student: not given;") and "student.model" in line
    (line,) = refused("distill", "recipe.yaml", "--set", "pruning.keep=3", "--student", "student", "--set", "seed=x")
    assert line.startswith("seed: ")


def test_prune_checks_its_options_under_their_own_names(folder, calls, glue_dir):
    args = ["--task", "sst2", "--data", str(glue_dir / "SST-2"), "--output-dir", "out"]
    fields = [line.split(":")[0] for line in refused("prune", "teacher", *args, "--keep", "2", "--round-to", "x")]
    assert fields == ["--keep", "--round-to"]
    result = call("prune", "teacher", *args, "--keep", "0.5", "--units", "neurons", "--compensate", "false")
    assert result.exit_code == 0, result.output
    (recipe,) = calls
    assert (recipe.teacher.model, recipe.data.task, recipe.output_dir) == ("teacher", "sst2", Path("out"))
    section = recipe.pruning
    assert (section.keep, section.units, section.compensate, section.round_to) == (0.5, ["neurons"], False, 1)
    assert recipe.data.columns is None and recipe.data.max_length == 128
    for word, value in (("true", True), ("in_order", "in_order")):
        assert call("prune", "teacher", *args, "--keep", "0.5", "--compensate", word).exit_code == 0
        assert calls.pop().pruning.compensate == value
    (line,) = refused("prune", "teacher", *args, "--keep", "0.5", "--compensate", "maybe")
    assert line == "--compensate: got 'maybe'; accepted: true, false or in_order"
    assert 'from_pretrained("pruned", trust_remote_code=True): ' in result.stdout


def test_prune_takes_every_other_field_of_a_recipe_by_set(folder, calls):
    args = ["prune", "teacher", "--task", "sst2", "--keep", "0.5", "--output-dir", "out", "--set"]
    result = call(*args, "pruning.cuts=3", "--set", "seed=7", "--set", "evaluation.latency.batch_size=2")
    assert result.exit_code == 0, result.output
    (recipe,) = calls
    assert (recipe.pruning.cuts, recipe.seed, recipe.evaluation.latency.batch_size) == (3, 7, 2)
    assert refused(*args, "pruning.cutts=3")[0].startswith("pruning.cutts: got 3; accepted: 'cuts' (the nearest)")


def test_prune_names_the_pipelines_faults_after_its_options(folder, calls, monkeypatch):
    options = {
        "teacher.model": "MODEL",
        "model": "MODEL",
        "data.task": "--task",
        "data.path": "--data",
        "data.columns.text": "--columns",
        "data.max_length": "--max-length",
        "pruning.calibration_examples": "--calibration-examples",
        "output_dir": "--output-dir",
    }

    def refuse(*args, **given):
        raise InputErrors(InputError(field, 1, "2") for field in options)

    monkeypatch.setattr(sys.modules["distill_llm.pipeline.run"], "prune_recipe", refuse)
    found = refused("prune", "teacher", "--task", "sst2", "--keep", "0.5", "--output-dir", "out")
    assert found == [f"{option}: got 1; accepted: 2" for option in options.values()]


def test_prune_takes_only_a_new_or_an_empty_folder(folder, calls, monkeypatch):
    args = ["prune", "teacher", "--task", "sst2", "--keep", "0.5", "--output-dir"]
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    for taken in (".", "..", "teacher", str(folder / "teacher"), "rows.csv"):
        (line,) = refused(*args, taken)
        assert line.startswith(f"--output-dir: got {taken!r}; accepted: a new or empty folder")
    assert sorted(folder.rglob("*")) == before and not calls
    for free in ("empty", "new/folder"):
        assert call(*args, free).exit_code == 0
    monkeypatch.chdir(folder / "empty")
    assert refused(*args, ".")[0].startswith("--output-dir: got '.'")
    assert len(calls) == 2


@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_columns_of_own_data_are_named_in_one_option(folder, calls, command):
    more = ["--keep", "0.5", "--output-dir", "out"] if command == "prune" else ["--output", "metrics.json"]
    args = [command, "teacher", "--task", "classification", "--data", "rows.csv", *more, "--columns"]
    for text, words in {
        "txt=review": "'text' (the nearest)",
        "text": "NAME=COLUMN",
        "text=review,text=mood": "each name once",
        "text=review,,label=mood": "text, text_pair, label",
    }.items():
        (line,) = refused(*args, text)
        assert line.startswith("--columns: got ") and words in line
    result = call(*args, "text=review, label=mood")
    assert result.exit_code == 0, result.output
    if command == "prune":
        data = calls[0].data
        assert (data.columns.text, data.columns.label, data.path) == ("review", "mood", "rows.csv")
    else:
        assert "accuracy" in json.loads((folder / "metrics.json").read_text())
        assert refused(*args, "text=revue,label=mood")[0].startswith("--columns: got 'revue'; accepted: 'review'")
        assert refused("evaluate", "teacher", "--task", "sst3")[0].startswith("--task: got 'sst3'")


@pytest.mark.parametrize(("command", "model"), [("evaluate", "MODEL"), ("cache", "TEACHER")])
def test_a_wrong_model_and_wrong_data_are_told_at_once(folder, command, model):
    more = {"evaluate": ["--output", "new.json"], "cache": ["--output-dir", "new"]}[command]
    lines = refused(command, "./none", "--task", "classification", "--data", "./none.csv", *more)
    assert [line.partition(":")[0] for line in lines] == [model, "--data"]


def test_commands_read_what_a_spreadsheet_writes(folder):
    rows = [f"le film é{i}\t{('neg', 'pos')[i % 2]}" for i in range(20)] + ["sans avis\t"]
    (folder / "sheet.csv").write_bytes("\n".join(["review\tmood", *rows]).encode("cp1252"))
    data = ["teacher", "--task", "classification", "--data", "sheet.csv", "--columns", "text=review,label=mood"]
    commands = {
        "evaluate": ["--test-examples", "1", "--output", "sheet.json"],
        "cache": ["--output-dir", "cached", "--k", "2"],
    }
    for command, more in commands.items():
        (line,) = refused(command, *data, *more)
        assert line.startswith("--encoding: got 'utf-8'; set it to the encoding of sheet.csv, for example cp1252")
        (line,) = refused(command, *data, *more, "--encoding", "cp1252", "--separator", ";")
        assert line.startswith("--columns: got 'review'")
        (line,) = refused(command, *data, *more, "--encoding", "cp1252", "--separator", ";;")
        assert line.startswith("--separator: got ';;'")
        (line,) = refused(command, *data, *more, "--encoding", "cp1252")
        assert "no value in 1 (number 21" in line and line.endswith("or set `--drop-incomplete` to leave such rows out")
        result = call(command, *data, *more, "--encoding", "cp1252", "--drop-incomplete")
        assert result.exit_code == 0, result.output
    assert json.loads((folder / "sheet.json").read_text())["rows"] == 1
    assert refused("evaluate", *data, "--encoding", "cp1252", "--drop-incomplete", "--test-examples", "9")[
        0
    ].startswith("--test-examples: got 9; accepted: 1 to 2")


def test_evaluate_saves_the_share_of_right_predictions(folder, glue_dir):
    task = folder / "SST-2"
    task.mkdir()
    for name in ("train", "dev"):
        text = "\n".join((glue_dir / "SST-2" / f"{name}.tsv").read_text().splitlines()[:41])
        (task / f"{name}.tsv").write_text(text + "\n")
    args = ["evaluate", "teacher", "--task", "sst2", "--data", str(task), "--output", "metrics.json"]
    result = call(*args)
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in (task / "dev.tsv").read_text().splitlines()[1:]]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text, _ in rows]
    right = sum(str(label) == wanted for label, (_, wanted) in zip(found, rows, strict=True))
    accuracy = json.loads((folder / "metrics.json").read_text())["accuracy"]
    assert accuracy == pytest.approx(right / 40) and f"{right / 40:.4f}" in result.stdout


def test_evaluate_refuses_what_it_cannot_write_and_a_metric_of_other_tasks(folder):
    for taken in ("teacher", "rows.csv/metrics.json"):
        (line,) = refused(*EVALUATE, "--output", taken)
        assert line.startswith(f"--output: got {taken!r}; accepted: the path of a file that can be written")
    assert refused(*EVALUATE, "--metric", "exact_match")[0].startswith("--metric: got 'exact_match'")


def test_evaluate_needs_no_training_rows_and_tells_classes_by_the_models_names(folder):
    names = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}
    write_model(folder / "named", max_position_embeddings=160, **names)
    for name, labels in (("some", ("neg",)), ("all", ("neg", "pos"))):
        (folder / name).mkdir()
        write_rows(folder / name / "test.csv", labels)
        command = ["evaluate", "named", *EVALUATE[2:4], "--data", name, *EVALUATE[6:], "--output", f"{name}.json"]
        result = call(*command)
        assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(folder / "named").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "named")
    with torch.no_grad():
        found = [model(**tokenizer(f"the film {i}", return_tensors="pt")).logits.argmax().item() for i in range(40)]
    share = {name: json.loads((folder / f"{name}.json").read_text())["accuracy"] for name in ("some", "all")}
    assert share["some"] == pytest.approx(sum(found) / 40)
    assert share["all"] == pytest.approx(sum(label == (i + 1) % 2 for i, label in enumerate(found)) / 40)


def test_evaluate_takes_a_models_own_order_of_the_classes_from_a_file_with_training_rows(folder):
    names = {"id2label": {0: "POS", 1: "NEG"}, "label2id": {"POS": 0, "NEG": 1}}
    write_model(folder / "named", max_position_embeddings=160, **names)
    result = call("evaluate", "named", *EVALUATE[2:], "--output", "named.json")
    assert result.exit_code == 0, result.output
    test = load_task(DataSpec("classification", "rows.csv", columns={"text": "review", "label": "mood"})).test
    model = AutoModelForSequenceClassification.from_pretrained(folder / "named").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "named")
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in test["text"]]
    moods = dict(line.split(",") for line in (folder / "rows.csv").read_text().splitlines()[1:])
    right = sum(("pos", "neg")[label] == moods[text] for label, text in zip(found, test["text"], strict=True))
    assert json.loads((folder / "named.json").read_text())["accuracy"] == pytest.approx(right / len(test))


def test_evaluate_takes_class_ids_for_the_models_classes_where_some_are_missing(folder):
    names = {"id2label": {0: "bad", 1: "so", 2: "good"}, "label2id": {"bad": 0, "so": 1, "good": 2}}
    write_model(folder / "three", max_position_embeddings=160, num_labels=3, **names)
    (folder / "ids").mkdir()
    write_rows(folder / "ids" / "test.csv", ("0", "2"))
    result = call("evaluate", "three", *EVALUATE[2:4], "--data", "ids", *EVALUATE[6:], "--output", "ids.json")
    assert result.exit_code == 0, result.output


def test_evaluate_on_a_full_disk_leaves_the_metrics_that_were_there(folder, monkeypatch):
    (folder / "full.json").write_text("before")
    fill_disk(monkeypatch)
    result = call(*EVALUATE, "--output", "full.json")  # after the progress bars of loading and scoring
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    line = result.stderr.rpartition("error: ")[2]
    assert line.startswith("disk: got 'full.json'; make room, then run the same command again: No space")
    assert (folder / "full.json").read_text() == "before"


@pytest.mark.parametrize("given", ["a=1", "{a: ["])
def test_evaluate_names_the_option_of_a_template_that_it_cannot_read(folder, given):
    (line,) = refused(*EVALUATE, "--chat-template-kwargs", given)
    assert line.startswith(f"--chat-template-kwargs: got {given!r}; accepted: ")


def test_evaluate_says_which_rows_of_a_lone_file_it_scored(folder, caplog):
    call(*EVALUATE)
    (line,) = [record.getMessage() for record in caplog.records if "test split" in record.getMessage()]
    assert line == (
        "the data have no test split: 4 of 40 rows, the same in every run, are set apart to score on (neg 2, pos 2)"
    )


@pytest.mark.slow
def test_quiet_shows_no_notice_and_no_warning(folder):
    loud, quiet = python("-m", "distill_llm", *EVALUATE), python("-m", "distill_llm", "--quiet", *EVALUATE)
    assert "the data have no test split" in loud.stderr
    assert quiet.returncode == 0 and quiet.stderr == "" and "accuracy" in quiet.stdout


def test_profile_prints_both_models(folder):
    write_model(folder / "smaller", layers=1)
    args = ["--batch-size", "2", "--sequence-length", "8"]
    result = call("profile", "smaller", "--against", "teacher", *args)
    assert result.exit_code == 0, result.output
    assert "smaller" in result.stdout and "teacher" in result.stdout and "latency" in result.stdout
    assert refused("profile", "smaller", "--against", "no/such/model")[0].startswith("--against: got ")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "smaller" / file).unlink()
    assert call("profile", "smaller", *args).exit_code == 0, "which reads no text"


def test_profile_refuses_a_batch_too_long_for_a_model_before_it_loads_weights(folder, monkeypatch):
    write_model(folder / "short", layers=1)  # 64 positions
    monkeypatch.setattr("distill_llm.cli.profile.load_model", None)
    (line,) = refused("profile", "teacher", "--sequence-length", "4000")
    assert line == "--sequence-length: got 4000; accepted: at most 160, the longest input of teacher"
    (line,) = refused("profile", "teacher", "--against", "short", "--sequence-length", "100")
    assert "at most 64, the longest input of short" in line


def test_recipes_lists_every_shipped_recipe_under_the_kind_of_models_that_it_is_for():
    result = call("recipes")
    assert result.exit_code == 0 and all(name in result.stdout for name in recipe_names())
    titles = ["Encoders", "with training", "Encoders", "without training", "LLMs", "with training", "LLMs", "without"]
    places = [-1]
    for title in titles:
        places.append(result.stdout.index(title, places[-1] + 1))
    assert places[3] < result.stdout.index("michel_heads") < places[5] < result.stdout.index("qlora") < places[7]


def test_recipes_shows_one_with_its_paper_cost_result_and_yaml():
    shown = call("recipes", "--show", "tinybert").stdout
    for part in ("Jiao et al. 2020", "**Cost.**", "**Result", "distill-llm run tinybert", "share: 0.875"):
        assert part in shown
    assert shown.endswith((recipe_folder() / "tinybert.yaml").read_text() + "\n")
    (line,) = refused("recipes", "--show", "tinybertt")
    assert line.startswith("--show: got 'tinybertt'; accepted: 'tinybert'")


def test_a_command_ends_the_process_group_that_it_ran_in():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    call("recipes")
    assert not torch.distributed.is_initialized()


def test_families_lists_every_family_and_what_can_be_pruned_of_it():
    result = call("families")
    assert result.exit_code == 0
    rows = {cells[0]: cells[1:] for line in result.stdout.splitlines() if len(cells := line.split()) == 8}
    assert set(FAMILIES) <= set(rows)
    assert rows["bert"] == ["yes", "-", "stock", "stock", "yes", "yes", "yes"]
    assert rows["llama"] == ["stock/*", "stock/", "stock", "stock", "yes", "yes", "stock/"]


def test_help_and_a_bad_recipe_need_no_torch_and_show_no_traceback(folder):
    code = "import sys\nfrom distill_llm.cli.main import app\ntry:\n    app(sys.argv[1:], prog_name='distill-llm')\n"
    code += "finally:\n    print('torch' in sys.modules)\n"
    for args, status in ((["--help"], 0), (["run", "recipe.yaml", "--set", "pruning.keep=9"], 2)):
        done = python("-c", code, *args)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert done.stdout.endswith("False\n")
    assert done.stderr == "error: pruning.keep: got 9; accepted: a number above 0 and at most 1\n"


def test_the_module_is_the_command():
    done = python("-m", "distill_llm", "run", "nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: RECIPE: got 'nothing'; accepted: ")
