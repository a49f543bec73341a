"""The device is waited for once an optimizer step, not at every micro-batch."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from builders.trainers import TERMS, model_of, rows, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

import distill_llm

PACKAGE, TORCH = str(Path(distill_llm.__file__).parent), str(Path(torch.__file__).parent)
WAITS = {
    "aten._local_scalar_dense.default": "item, bool, int or float of a tensor",
    "aten.nonzero.default": "a result whose size the host must know",
    "aten.masked_select.default": "a result whose size the host must know",
    "aten.lift_fresh.default": "a tensor made of Python numbers, copied to the device",
}


class Waits(TorchDispatchMode):
    """Counts operations for which a host waits for its device, where a line of this package asked for them."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in WAITS:
            self.note(str(function), sys._getframe(1))
        return function(*args, **(kwargs or {}))

    def note(self, name, frame):
        while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            self.found[name] += 1


def waits_of(steps, folder, monkeypatch, head, losses):
    teacher, student = model_of(head, layers=4), model_of(head, layers=2, hidden=24, seed=1)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": steps}
    trainer = trainer_of(
        folder, student, teacher, rows(teacher, count=24), losses, max_steps=steps, optim="sgd", **settings
    )
    mode = Waits()
    with monkeypatch.context() as patches, mode:
        for name in ("tolist", "cpu", "numpy"):
            original = getattr(torch.Tensor, name)

            def counted(tensor, *args, name=name, original=original, **kwargs):
                mode.note(name, sys._getframe(1))
                return original(tensor, *args, **kwargs)

            patches.setattr(torch.Tensor, name, counted)
        trainer.train()
    return mode.found


@pytest.mark.parametrize(
    "head", ["sequence-classification", pytest.param("masked-lm", marks=pytest.mark.slow), "causal-lm"]
)
def test_a_step_of_two_micro_batches_waits_once_and_for_the_tokens_of_a_head_per_token(tmp_path, monkeypatch, head):
    losses = TERMS["all"]
    few, many = (waits_of(steps, tmp_path, monkeypatch, head, losses) for steps in (2, 6))
    assert few["tolist"] == 2 + 2, "the order of the rows, the log of the terms, and whether each step is finite"
    more = many - few
    tokens = {} if head == "sequence-classification" else {"aten.nonzero.default": 4 * 2}
    assert more == {"tolist": 4, **tokens}, more
