"""Statistics of tiny models on batches of uneven length, some of which a process sees."""

from builders.families import family_model
from builders.models import random_batch, tiny_model

from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings

CASES = {
    "bert": ("labels", 5),
    "llama": ("labels", 5),
    "own predictions": ("kl", 5),
    "none": (None, 5),
    "fewer batches than processes": ("labels", 1),
}


def statistics_of(case: str) -> Statistics:
    """Those of a case, by all processes together."""
    loss, count = CASES[case]
    model = family_model("llama") if case == "llama" else tiny_model()
    batches = [random_batch(model, batch=2 + i % 3, length=6 + i, seed=i) for i in range(count)]
    if case == "llama":
        batches = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches]
    found = collect_statistics(
        model, batches, loss, settings=CalibrationSettings(hidden_moments=True, exact=True, sharded=True)
    )
    return leave_one_out(
        model, batches, found, "labels" if loss == "labels" else "kl", settings=CalibrationSettings(sharded=True)
    )
