"""Statistics that two processes collect together are those of one process."""

import pytest
import torch
from builders.calibration import CASES, statistics_of
from builders.processes import Started
from safetensors import safe_open

from distill_llm.pruning.statistics.processes import from_main_process, sum_over_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one process, and two processes, have saved their statistics."""
    folder = tmp_path_factory.mktemp("sharding")
    two = Started("collect_statistics.py", folder, processes=2)
    for case in CASES:
        statistics_of(case).save(folder / f"one-0-{case}.safetensors")
    two.output()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_statistics_of_one(folder, case):
    one, first, second = (
        safe_open(folder / f"{name}-{case}.safetensors", "pt") for name in ("one-0", "two-0", "two-1")
    )
    assert one.metadata() == first.metadata() == second.metadata()
    names = set(one.keys())
    assert names == set(first.keys()) == set(second.keys())
    for name in names:
        a, b, other = (file.get_tensor(name) for file in (one, first, second))
        assert torch.equal(b, other), f"{name}: the processes hold the same"
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5 * float(a.abs().max()) if a.numel() else 0, msg=name)


def test_one_process_alone_keeps_its_sums():
    sums = torch.tensor([1.0, 2.0])
    sum_over_processes([sums])
    assert sums.tolist() == [1.0, 2.0] and from_main_process("a") == "a"
