"""Terms with a memory in a whole run: from a recipe to a student, stopped in between or not."""

import pytest
from builders.runs import same, two_rounds, weights

import distill_llm
from distill_llm.training.trainer import DistillationTrainer

LOSSES = {
    "labels": {"weight": 0.5},
    "contrast": {"weight": 0.1, "queue": 16, "negatives": "other_classes"},
    "qud": {"weight": 0.1, "queue": 16, "pool": "first"},
    "adadistill": {"weight": 0.1, "scale": 16, "margin": 0.2, "hard": True},
}


class Stopped(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_a_run_that_is_stopped_between_steps_goes_on_with_its_queues_and_centres(finished, inputs, monkeypatch):
    recipe = two_rounds(inputs)
    recipe["distillation"]["losses"] = LOSSES
    distill_llm.run(recipe, inputs / "remembers")
    step, left = DistillationTrainer.training_step, [22]  # 12 micro-batches of the teacher's training come first

    def stops(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(DistillationTrainer, "training_step", stops)
        distill_llm.run(recipe, inputs / "stopped")
    assert list((inputs / "stopped").glob("**/checkpoint-*/terms.pt"))
    distill_llm.run(recipe, inputs / "stopped")
    for name in ("round-1/student", "student"):
        assert same(weights(inputs / "remembers" / name), weights(inputs / "stopped" / name)), name
    assert not same(weights(inputs / "remembers" / "student"), weights(inputs / "uninterrupted" / "student"))
