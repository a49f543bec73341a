"""Runs that are killed: the same command goes on, to the same weights."""

import json
import os
import signal
import time

import pytest
from builders.grids import slow
from builders.processes import run_recipe
from builders.recipes import causal_recipe, write_decoder, write_recipe
from builders.runs import same, two_rounds, weights

import distill_llm
from distill_llm.pipeline.checkpoints import MarkComplete
from distill_llm.pruning.compensation import in_order
from distill_llm.pruning.cutting.strength import IN_ORDER
from distill_llm.training.trainer import DistillationTrainer


class Killed(BaseException):
    """Stands for the end of the process: nothing below main handles it."""


def killed_at(event: int, monkeypatch) -> None:
    """Stop the run at its n-th training step, file swap or checkpoint mark, whichever kind is due."""
    left = [event]

    def due() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    step, swap, mark = DistillationTrainer.training_step, os.replace, MarkComplete.on_save
    monkeypatch.setattr(DistillationTrainer, "training_step", lambda *a, **k: (due(), step(*a, **k))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (due(), swap(*a))[1])
    monkeypatch.setattr(MarkComplete, "on_save", lambda *a, **k: (due(), mark(*a, **k))[1])


@pytest.mark.parametrize("events", [[14], *slow([2, 11, 9, 5, 16, 13, 12, 19, 11, 17, 13])], ids=len)
def test_killed_again_and_again_the_same_command_ends_with_the_same_weights(finished, inputs, monkeypatch, events):
    folder, kills, done = inputs / f"killed-{len(events)}", 0, 0
    for event in (*events, 1000):
        with monkeypatch.context() as patch:
            killed_at(event, patch)
            try:
                distill_llm.run(two_rounds(inputs), folder)
                break
            except Killed:
                kills += 1
        state = folder / "state.json"
        before, done = done, len(json.loads(state.read_text())["stages"]) if state.is_file() else 0
        assert done >= before
    assert kills >= len(events) / 2
    for name in ("teacher", "round-1/student", "student"):
        assert same(weights(folder / name), weights(inputs / "uninterrupted" / name)), name


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_fits_in_order_ends_with_the_same_weights(tmp_path, monkeypatch):
    write_decoder(tmp_path / "teacher", num_hidden_layers=3)
    pruning = {"keep": 0.6, "calibration_examples": 16, "compensate": "in_order"}
    training = {
        "losses": {"labels": {}, "logits": {}},
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
    }
    recipe = causal_recipe(tmp_path, pruning=pruning, distillation=training, student__model=None)
    distill_llm.run(recipe, tmp_path / "whole")
    calls, fit = [0], in_order.refit_in_order

    def due(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        fit(*args, **kwargs)

    monkeypatch.setattr("distill_llm.pruning.cutting.in_order.refit_in_order", due)
    with pytest.raises(Killed):
        distill_llm.run(recipe, tmp_path / "killed")
    distill_llm.run(recipe, tmp_path / "killed")
    for name in ("round-1/pruned", "student"):
        assert same(weights(tmp_path / "killed" / name), weights(tmp_path / "whole" / name)), name
    folders = [tmp_path / name for name in ("whole", "killed")]
    metrics = [json.loads((folder / "metrics.json").read_text())["rounds"][0] for folder in folders]
    assert metrics[0]["compensation"] == metrics[1]["compensation"]
    assert {"none", "0.1", "in order, ridge 1, share 1"} <= metrics[0]["compensation"][0]["divergence"].keys()
    distill_llm.run(recipe, tmp_path / "killed")
    assert calls[0] < 3 + 2 * (len(IN_ORDER) + 1), "what is done is not done again"


@pytest.mark.slow
def test_a_process_killed_by_the_system_goes_on_to_the_same_weights(finished, inputs):
    file, out = write_recipe(inputs, two_rounds(inputs)), inputs / "sigkill"
    process = run_recipe(file, out)
    while not (out / "state.json").is_file() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run_recipe(file, out)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert same(weights(out / "student"), weights(inputs / "uninterrupted" / "student"))
