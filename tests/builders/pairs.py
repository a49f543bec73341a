"""The same training in one process and in two."""

import json
from pathlib import Path

import pytest
import torch
from builders.learning import Cases, Learned, learned
from builders.processes import fork, run_script

Runs = list[dict[str, Learned]]


def one_and_two_processes(folder: Path, cases: Cases) -> Runs:
    """What one process, the first of two and the second of two have learned of these cases."""
    one = learned(folder, cases)
    if torch.accelerator.is_available():
        run_script("train_in_processes.py", folder, json.dumps(cases), processes=2, ACCELERATE_USE_CPU="true")
    else:
        fork(lambda rank: torch.save(learned(folder, cases), folder / f"{rank}.pt"), ACCELERATE_USE_CPU="true")
    return [one, *(torch.load(folder / f"{rank}.pt") for rank in (0, 1))]


def assert_alike(runs: Runs, case: str) -> tuple[list[int], list[int], list[int]]:
    """The two processes end alike, and as the one did, with the same logs."""
    (one, one_logs, all_seen), (two, two_logs, seen), (other, _, other_seen) = (run[case] for run in runs)
    assert one.keys() == two.keys() == other.keys()
    for parameter, tensor in one.items():
        torch.testing.assert_close(two[parameter], tensor, rtol=2e-4, atol=2e-5, msg=parameter)
        assert torch.equal(two[parameter], other[parameter]), parameter
    assert len(one_logs) == 2
    for a, b in zip(one_logs, two_logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6), json.dumps([a, b])
    return all_seen, seen, other_seen


def assert_each_step_seen(runs: Runs, head: str, name: str) -> None:
    """Both processes saw each of four batches; the second one no label of a case that says so."""
    _, seen, other_seen = assert_alike(runs, f"{head} {name}")
    assert len(seen) == len(other_seen) == 4 and all(seen)
    assert any(other_seen) == ("one rank" not in name)
