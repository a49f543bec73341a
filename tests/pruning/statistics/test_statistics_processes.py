"""Statistics that two processes collect together are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.families import family_model
from builders.models import random_batch, tiny_model
from safetensors import safe_open

from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.statistics.processes import from_main_process, sum_over_processes
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings

SCRIPT = """
import sys
sys.path[:0] = {path!r}
import torch, torch.distributed as dist
from {module} import statistics_of, CASES
dist.init_process_group("gloo")
for case in CASES:
    statistics_of(case).save({folder!r} + f"/two-{{dist.get_rank()}}-{{case}}.safetensors")
"""
CASES = {
    "bert": ("labels", 5),
    "llama": ("labels", 5),
    "own predictions": ("kl", 5),
    "none": (None, 5),
    "fewer batches than processes": ("labels", 1),
}


def statistics_of(case: str) -> Statistics:
    """Statistics of a tiny model on batches of uneven length, some of which this process sees."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one process, and two processes, have saved their statistics."""
    folder, root = tmp_path_factory.mktemp("sharding"), Path(__file__).parents[3]
    path = [str(root), str(root / "tests"), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = folder / "two.py"
    script.write_text(SCRIPT.format(path=path, module=Path(__file__).stem, folder=str(folder)))
    two = subprocess.Popen([*launcher, str(script)], env=environment, stderr=subprocess.PIPE, text=True)
    for case in CASES:
        statistics_of(case).save(folder / f"one-0-{case}.safetensors")
    _, errors = two.communicate(timeout=120)
    assert two.returncode == 0, errors[-3000:]
    return folder


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
