"""The whole loop on a tiny model: what it leaves behind, going on after a stop, several processes."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from builders.grids import slow
from builders.recipes import WORDS, recipe_for, write_model, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import distill_llm
from distill_llm.common.errors import InputError, faults_in
from distill_llm.data import DataSpec
from distill_llm.pipeline import folder as run_folder
from distill_llm.pipeline.caching import cache_teacher
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.rounds import Cutter
from distill_llm.pipeline.run import prune_recipe
from distill_llm.pipeline.stages.prune import kept_after
from distill_llm.pruning.planning.budgets import share_of
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.training.trainer import DistillationTrainer

ROOT = Path(__file__).parents[2]


def write_rows(file: Path, rows: int = 48) -> None:
    """Rows of uneven length that can be learnt: a film with "good" in it is liked."""
    random = Random(0)
    lines = ["review,mood"]
    for _ in range(rows):
        text = random.choices(WORDS[5:], k=random.randint(2, 12))
        lines.append(f"{' '.join(text)},{'pos' if 'good' in text else 'neg'}")
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def recipe(folder: Path, **changes) -> dict:
    """Two rounds on a teacher that is trained first, a few steps each, with dropout, accumulation and length grouping."""
    training = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "group_by_length",
        "save_steps": 2,
    }
    losses = {
        "labels": {"weight": 0.5},
        "logits": {"weight": 0.5, "temperature": 2.0},
        "hidden": {"weight": 1.0},
        "attention": {"weight": 1.0},
    }
    return recipe_for(
        folder,
        **{
            "teacher": {"model": str(folder / "teacher"), "train": training},
            "pruning": {"keep": 0.5, "rounds": 2, "calibration_examples": 8},
            "distillation": {"losses": losses, **training},
            **changes,
        },
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a teacher and rows."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder / "teacher", max_position_embeddings=64)
    write_rows(folder / "rows.csv")
    return folder


@pytest.fixture(scope="module")
def finished(inputs) -> distill_llm.RunResult:
    """An uninterrupted run."""
    return distill_llm.run(recipe(inputs), inputs / "uninterrupted")


def pruned_alone(model: Path, out: Path, data: dict, **pruning) -> Path:
    """What `distill-llm prune` makes of a model."""
    given = {"teacher": {"model": str(model)}, "data": data, "pruning": pruning, "output_dir": str(out)}
    return prune_recipe(parse_recipe(given))


def rows_of(inputs: Path) -> dict:
    """The data section for the rows of `inputs`."""
    columns = {"text": "review", "label": "mood"}
    return {"task": "classification", "path": str(inputs / "rows.csv"), "columns": columns, "max_length": 16}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_the_files_of_its_format_and_a_student_that_loads_anywhere(finished, inputs):
    folder = inputs / "uninterrupted"
    for name in [
        "recipe.yaml",
        "state.json",
        "metrics.json",
        "report.md",
        "figures/scores.png",
        "figures/kept.png",
        "teacher/config.json",
        "round-1/statistics.safetensors",
        "round-1/statistics.json",
        "round-1/plan.json",
        "round-1/plan.png",
        "round-1/student/config.json",
        "round-2/plan.json",
        "student/model.safetensors",
        "student/README.md",
        "student/tokenizer_config.json",
    ]:
        assert (folder / name).is_file(), name
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*-training"))
    ours = distill_llm.load_pretrained(folder / "student")
    remote = AutoModelForSequenceClassification.from_pretrained(folder / "student", trust_remote_code=True)
    encoded = AutoTokenizer.from_pretrained(folder / "student")("the film 3", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(ours(**encoded).logits, remote(**encoded).logits)


def test_metrics_json_counts_what_the_saved_models_hold(finished, inputs):
    folder = inputs / "uninterrupted"
    metrics = json.loads((folder / "metrics.json").read_text())
    sizes = {}
    for name, path in (("teacher", "teacher"), ("student", "student")):
        tensors = weights(folder / path)
        sizes[name] = sum(t.numel() for t in tensors.values())
        assert metrics[name]["params"] == sizes[name]
        assert metrics[name]["layer_params"] == sum(t.numel() for k, t in tensors.items() if ".encoder.layer." in k)
    assert metrics["params_kept"] == pytest.approx(sizes["student"] / sizes["teacher"])
    assert 0.49 < metrics["layer_params_kept"] <= 0.5
    assert [row["layer_params_kept"] for row in metrics["rounds"]] == pytest.approx([0.5625, 0.5], abs=0.02)
    assert metrics["retention"] == pytest.approx(metrics["student"]["score"] / metrics["teacher"]["score"])
    assert {"pruned", "compensated", "recovered"} <= metrics["rounds"][0].keys()


class Killed(BaseException):
    """Stands for the end of the process: nothing below main handles it."""


def killed_at(event: int, monkeypatch) -> None:
    """Stop the run at its n-th training step, file swap or checkpoint mark, whichever kind is due."""
    left = [event]

    def due() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    step, swap, mark = DistillationTrainer.training_step, os.replace, run_folder.MarkComplete.on_save
    monkeypatch.setattr(DistillationTrainer, "training_step", lambda *a, **k: (due(), step(*a, **k))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (due(), swap(*a))[1])
    monkeypatch.setattr(run_folder.MarkComplete, "on_save", lambda *a, **k: (due(), mark(*a, **k))[1])


@pytest.mark.parametrize("events", [(14,), *slow((2, 11, 9, 5, 16, 13, 12, 19, 11, 17, 13))], ids=len)
def test_killed_again_and_again_the_same_command_ends_with_the_same_weights(finished, inputs, monkeypatch, events):
    folder, kills, done = inputs / f"killed-{len(events)}", 0, 0
    for event in (*events, 1000):
        with monkeypatch.context() as patch:
            killed_at(event, patch)
            try:
                distill_llm.run(recipe(inputs), folder)
                break
            except Killed:
                kills += 1
        state = folder / "state.json"
        before, done = done, len(json.loads(state.read_text())["stages"]) if state.is_file() else 0
        assert done >= before
    assert kills >= len(events) / 2
    for name in ("teacher", "round-1/student", "student"):
        assert same(weights(folder / name), weights(inputs / "uninterrupted" / name)), name


def test_a_finished_run_is_not_done_again(finished, inputs):
    before = {p: p.stat().st_mtime_ns for p in (inputs / "uninterrupted").rglob("*") if p.is_file()}
    distill_llm.run(recipe(inputs), inputs / "uninterrupted")
    after = {p: p.stat().st_mtime_ns for p in (inputs / "uninterrupted").rglob("*") if p.is_file()}
    assert before == after


def test_a_folder_with_another_run_or_other_files_is_refused_and_left_alone(finished, inputs, tmp_path):
    other = recipe(inputs, pruning={"keep": 0.4, "calibration_examples": 8})
    with pytest.raises(InputError, match="output_dir.*pruning differ"):
        distill_llm.run(other, inputs / "uninterrupted")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="output_dir"):
        distill_llm.run(recipe(inputs), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_distillation_alone_trains_a_given_student(finished, inputs):
    given = {
        **recipe(inputs, student={"model": str(inputs / "uninterrupted" / "round-1" / "pruned")}),
        "pruning": None,
        "teacher": {"model": str(inputs / "uninterrupted" / "teacher")},
    }
    result = distill_llm.run(given, inputs / "alone")
    assert result.metrics["student"]["params"] < result.metrics["teacher"]["params"]
    assert not same(weights(result.student_dir), weights(inputs / "uninterrupted" / "round-1" / "pruned"))


def test_pruning_alone_saves_a_smaller_model_and_its_plan_without_training(finished, inputs, glue_dir):
    folder = inputs / "sst2"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "of", "film", "good", "bad", "not"]
    write_model(
        folder / "model", words, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}
    )
    data = {"task": "sst2", "path": str(glue_dir / "SST-2"), "max_length": 32}
    out = pruned_alone(folder / "model", folder / "out", data, keep=0.5, calibration_examples=16)
    plan = distill_llm.PruningPlan.load(out / "plan.json")
    kept = distill_llm.load_pretrained(out)
    assert sum(p.numel() for n, p in kept.named_parameters() if ".encoder.layer." in n) == pytest.approx(
        plan.kept * sum(t.numel() for k, t in weights(folder / "model").items() if ".encoder.layer." in k)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"units": ["hidden", "heads", "neurons"], "cost": "memory", "round_to": 4},
        {"units": ["attention", "ffn"], "cost": "flops", "loss": "kl"},
        {"units": ["layers"], "criterion": "leave_one_out"},
        {"criterion": "wanda", "cuts": 2, "min_heads": 1, "min_neurons": 8},
        {"cost": "latency"},
    ],
    ids=str,
)
def test_pruning_alone_takes_every_field_of_the_pruning_section(inputs, tmp_path, capsys, monkeypatch, options):
    # Of a model this small the clock says little: its layers' parameters stand for time.
    times = lambda model, other, *batch: share_of(model, other, "params")  # noqa: E731
    for module in ("pipeline.rounds", "pruning.planning.latency"):
        monkeypatch.setattr(f"distill_llm.{module}.relative_latency", times)
    monkeypatch.setattr("distill_llm.pipeline.rounds.latency_costs", lambda model, *batch: unit_costs(model))
    model = inputs / "labelled"
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    write_model(model, max_position_embeddings=64, **names)
    out = pruned_alone(model, tmp_path / "out", rows_of(inputs), keep=0.7, calibration_examples=8, **options)
    plan = distill_llm.PruningPlan.load(out / "plan.json")
    assert 0.4 < plan.kept <= 0.7 * 1.03 and (out / "plan.png").is_file()
    assert distill_llm.load_pretrained(out).num_parameters() < distill_llm.load_pretrained(model).num_parameters()
    printed = capsys.readouterr().out
    assert "parameters" in printed and f"{100 * plan.kept:.1f}% of" in printed


def test_a_second_budget_reads_no_data_for_its_importance(inputs, tmp_path, monkeypatch):
    data, file = rows_of(inputs), str(tmp_path / "all" / "statistics.safetensors")
    options = {"calibration_examples": 8, "statistics": file}
    model = inputs / "labelled-too"
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    write_model(model, max_position_embeddings=64, **names)
    pruned_alone(model, tmp_path / "first", data, keep=0.7, **options)
    monkeypatch.setattr("distill_llm.pipeline.rounds.collect_statistics", None)
    pruned_alone(model, tmp_path / "second", data, keep=0.5, criterion="taylor", **options)
    kept = [distill_llm.PruningPlan.load(tmp_path / name / "plan.json").kept for name in ("first", "second")]
    assert kept == pytest.approx([0.7, 0.5], rel=0.02)


def test_pruning_alone_refuses_what_it_would_leave_undone(inputs, tmp_path):
    given = recipe(inputs, hub={"repo_id": "me/student"}, student={"peft": {"r": 2}})
    with pytest.raises(InputError) as error:
        prune_recipe(parse_recipe({**given, "output_dir": str(tmp_path / "out")}))
    fields = [fault.field for fault in faults_in(error.value)]
    assert fields == ["teacher.train", "student", "distillation", "hub", "pruning.rounds"]
    alone = {"teacher": {"model": str(inputs / "teacher")}, "data": given["data"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match="pruning.layers: got"):
        prune_recipe(parse_recipe({**alone, "pruning": {"layers": [0]}}))
    assert not (tmp_path / "out").exists()


def test_pruning_alone_leaves_a_folder_with_files_alone(finished, inputs, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="output_dir"):
        pruned_alone(inputs / "teacher", tmp_path, rows_of(inputs), keep=0.5)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="output_dir"):
        pruned_alone(inputs / "teacher", inputs / "uninterrupted", rows_of(inputs), keep=0.5)
    assert (inputs / "uninterrupted" / "state.json").is_file(), "a run's folder"


def test_the_best_checkpoint_is_chosen_by_the_task_metric_on_held_out_rows(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.csv", rows=64)
    for name, seed in (("teacher", 0), ("student", 1)):
        write_model(tmp_path / name, max_position_embeddings=64, seed=seed)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "eval_strategy": "steps"}
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    steps = {"eval_steps": 2, "save_steps": 2}
    given = recipe_for(tmp_path, student={"model": str(tmp_path / "student")}, pruning=None)
    given["data"]["holdout_examples"] = 20
    given["distillation"] = {"losses": {"labels": {}}, **best, **training, **steps}
    monkeypatch.setattr(
        "distill_llm.pipeline.stages.recover.remove_checkpoints", lambda *_: None
    )  # leaves the checkpoints to look at
    result = distill_llm.run(given, tmp_path / "run")
    work = tmp_path / "run" / "round-1" / "student-training"
    last = max(int(path.name.rpartition("-")[2]) for path in work.iterdir())
    log = json.loads((work / f"checkpoint-{last}" / "trainer_state.json").read_text())["log_history"]
    accuracy, loss = (
        {row["step"]: row[f"eval_{name}"] for row in log if "eval_loss" in row} for name in ("accuracy", "loss")
    )
    chosen = max(accuracy, key=accuracy.__getitem__)
    assert accuracy[chosen] > accuracy[last] and chosen != min(loss, key=loss.__getitem__), "else it could be by chance"
    assert result.metrics["student"]["metrics"]["validation"] == accuracy[chosen]
    assert same(weights(result.student_dir), weights(work / f"checkpoint-{chosen}"))


@pytest.mark.slow
def test_how_a_student_is_scored_and_pushed_may_change_in_a_run_but_not_what_decides_it(inputs, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("distill_llm.checks.recipe.check_push", lambda *_: None)
    monkeypatch.setattr(
        "distill_llm.report.hub.push", lambda folder, repo_id, private: pushed.append(repo_id) or repo_id
    )
    given = {**recipe(inputs), "teacher": {"model": str(inputs / "teacher")}, "distillation": None}
    given["pruning"] = {"keep": 0.5, "calibration_examples": 8}
    distill_llm.run(given, tmp_path / "run")
    for name in ("me/first", "me/first", "me/second"):
        distill_llm.run({**given, "hub": {"repo_id": name}}, tmp_path / "run")
    assert pushed == ["me/first", "me/second"]
    scored = {"batch_size": 3, "latency": {"batch_size": 1, "sequence_length": 8}}
    again = distill_llm.run({**given, "evaluation": scored, "description": "another"}, tmp_path / "run")
    assert again.metrics["latency"] == scored["latency"], "measured anew"
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["evaluation"]["batch_size"] == 3 and written["description"] == "another"
    with pytest.raises(InputError, match="evaluation differ"):
        distill_llm.run({**given, "evaluation": {**scored, "max_new_tokens": 8}}, tmp_path / "run")
    by_flops = {**given, "pruning": {**given["pruning"], "cost": "flops"}}
    distill_llm.run(by_flops, tmp_path / "flops")
    distill_llm.run({**by_flops, "evaluation": {**given["evaluation"], "batch_size": 3}}, tmp_path / "flops")
    with pytest.raises(InputError, match="evaluation differ"):
        distill_llm.run({**by_flops, "evaluation": scored}, tmp_path / "flops")


def test_round_1_cuts_the_teacher_itself_whose_share_is_no_matter_of_a_clock(inputs, tmp_path, monkeypatch):
    seen, cut = [], Cutter.cut
    monkeypatch.setattr(Cutter, "cut", lambda self, a, b, *rest: (seen.append(a is b), cut(self, a, b, *rest))[1])
    given = {**recipe(inputs), "teacher": {"model": str(inputs / "teacher")}, "distillation": None}
    distill_llm.run(given, tmp_path / "run")
    assert seen == [True, False]


@pytest.mark.slow
def test_nothing_that_trained_or_was_pruned_lives_on_when_a_model_is_scored(inputs, tmp_path, monkeypatch):
    kinds, bodies, found = (PreTrainedModel, torch.optim.Optimizer), ("BertModel", "PrunedBertModel"), []
    gc.collect()
    before = [each for each in gc.get_objects() if issubclass(type(each), kinds)]
    known = {id(each) for each in before}

    def names() -> list[str]:
        alive = [each for each in gc.get_objects() if issubclass(type(each), kinds) and id(each) not in known]
        return sorted(name for each in alive if (name := type(each).__name__) not in bodies)

    evaluate = Context.evaluate
    monkeypatch.setattr(Context, "evaluate", lambda self, model: (found.append(names()), evaluate(self, model))[1])
    teacher, pruned = "BertForSequenceClassification", "PrunedBertForSequenceClassification"
    gc.disable()  # what is freed is freed on purpose
    try:
        distill_llm.run(recipe(inputs), tmp_path / "run")
        assert names() == []
    finally:
        gc.enable()
    first, second = [[teacher, pruned]] * 2, [[pruned, pruned]] * 2
    assert found[1:3] == first and found[4:6] == second, found
    assert [found[0], found[3], found[6]] == [[teacher], [pruned], [pruned]]


def test_a_cache_of_other_rows_is_refused_before_any_stage(inputs, tmp_path):
    data = DataSpec(**{**recipe(inputs)["data"], "max_length": 16})
    cache_teacher(str(inputs / "teacher"), data, tmp_path / "cache")
    teacher = {"model": str(inputs / "teacher"), "cache": str(tmp_path / "cache")}
    given = recipe(inputs, teacher=teacher, distillation={"losses": {"logits": {}}, "max_steps": 1})
    given["pruning"] = {"keep": 0.5, "calibration_examples": 8}
    with pytest.raises(InputError, match="^teacher.cache: got .* another data"):
        distill_llm.run({**given, "data": {**given["data"], "max_length": 12}}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert distill_llm.run(given, tmp_path / "run").metrics["retention"] > 0


def test_schedules_end_at_keep_and_cubic_removes_most_early():
    assert [kept_after(0.4, n, 3, "linear") for n in (1, 2, 3)] == pytest.approx([0.8, 0.6, 0.4])
    assert [kept_after(0.2, n, 2, "cubic") for n in (1, 2)] == pytest.approx([0.2 + 0.8 / 8, 0.2])


def command(file: Path, out: Path, launcher: tuple[str, ...] = (), *settings: str) -> subprocess.Popen:
    """`distill-llm run` as a process of its own."""
    sets = [part for setting in settings for part in ("--set", setting)]
    line = [sys.executable, *launcher, "-m", "distill_llm", "run", str(file), "--output-dir", str(out), *sets]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_processes_run_from_a_teacher_that_is_trained_already(finished, inputs):
    given = {**recipe(inputs), "teacher": {"model": str(inputs / "uninterrupted" / "teacher")}}
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/ddp.yaml"))
    run = command(write_recipe(inputs, given), inputs / "untrained", launch)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert (inputs / "untrained" / "metrics.json").is_file()


@pytest.mark.slow
def test_a_process_killed_by_the_system_goes_on_to_the_same_weights(finished, inputs):
    file, out = write_recipe(inputs, recipe(inputs)), inputs / "sigkill"
    process = command(file, out)
    while not (out / "state.json").is_file() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = command(file, out)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert same(weights(out / "student"), weights(inputs / "uninterrupted" / "student"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives_on_the_same_global_batch(inputs):
    folder = inputs / "processes"
    write_model(
        folder / "teacher", max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    # 40 rows make whole batches for both: accelerate repeats rows to fill the last batch of several processes.
    write_rows(folder / "rows" / "train.csv", rows=40)
    write_rows(folder / "rows" / "test.csv", rows=8)
    given = recipe(folder)
    given["data"]["path"] = str(folder / "rows")
    for training in (given["teacher"]["train"], given["distillation"]):
        # Adam would turn rounding differences of entries without gradient into whole steps.
        training |= {"optim": "sgd", "learning_rate": 0.05}
    # The least squares of so few tokens would enlarge the rounding of a sum over two processes a thousandfold.
    given["pruning"] |= {"calibration_examples": 40, "compensate": False}
    file = write_recipe(folder, given)
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/ddp.yaml"))
    one = command(file, folder / "one")
    output, _ = one.communicate()
    assert one.returncode == 0, output
    halved = [f"{stage}.per_device_train_batch_size=2" for stage in ("teacher.train", "distillation")]
    two = command(file, folder / "two", launch, *halved)
    output, _ = two.communicate()
    assert two.returncode == 0, output
    for number in (1, 2):
        plans = [(folder / run / f"round-{number}" / "plan.json").read_text() for run in ("one", "two")]
        assert plans[0] == plans[1]
    for name in ("teacher", "round-1/student", "student"):
        a, b = weights(folder / "one" / name), weights(folder / "two" / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
    assert (
        yaml.safe_load((folder / "two" / "recipe.yaml").read_text())["distillation"]["per_device_train_batch_size"] == 2
    )
