"""Whole runs by two processes."""

import pytest
import torch
import yaml
from builders.processes import run_recipe
from builders.recipes import write_model, write_recipe
from builders.runs import two_rounds, weights, write_learnable_rows

TWO = ("--accelerate", "ddp", "--processes", "2")


@pytest.mark.slow
def test_two_processes_run_from_a_teacher_that_is_trained_already(finished, inputs):
    given = {**two_rounds(inputs), "teacher": {"model": str(inputs / "uninterrupted" / "teacher")}}
    run = run_recipe(write_recipe(inputs, given), inputs / "untrained", TWO)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    assert (inputs / "untrained" / "metrics.json").is_file()


@pytest.mark.slow
def test_a_fault_that_the_processes_find_is_one_line_and_exit_code_2(inputs):
    given = {**two_rounds(inputs), "teacher": {"model": str(inputs / "nowhere")}}
    run = run_recipe(write_recipe(inputs, given), inputs / "nothing", TWO)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 2, output
    assert [line for line in output.splitlines() if "nowhere" in line and line.startswith("error: teacher.model")]
    assert "Traceback" not in output and not (inputs / "nothing").exists()


@pytest.mark.slow
def test_two_processes_give_what_one_gives_on_the_same_global_batch(inputs):
    folder = inputs / "processes"
    write_model(
        folder / "teacher", max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    # 40 rows make whole batches for both: accelerate repeats rows to fill the last batch of several processes.
    write_learnable_rows(folder / "rows" / "train.csv", rows=40)
    write_learnable_rows(folder / "rows" / "test.csv", rows=8)
    given = two_rounds(folder)
    given["data"]["path"] = str(folder / "rows")
    for training in (given["teacher"]["train"], given["distillation"]):
        # Adam would turn rounding differences of entries without gradient into whole steps.
        training |= {"optim": "sgd", "learning_rate": 0.05}
    # The least squares of so few tokens would enlarge the rounding of a sum over two processes a thousandfold.
    given["pruning"] |= {"calibration_examples": 40, "compensate": False}
    file = write_recipe(folder, given)
    one = run_recipe(file, folder / "one")
    output, _ = one.communicate()
    assert one.returncode == 0, output
    halved = [f"{stage}.per_device_train_batch_size=2" for stage in ("teacher.train", "distillation")]
    two = run_recipe(file, folder / "two", TWO, *halved)
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
