"""Sharded over two processes (FSDP2), a language model trains as the whole one."""

import pytest
import torch
from builders.processes import run_script
from builders.sharding import FSDP2

from distill_llm.training.shards import clip_with


@pytest.mark.slow
def test_a_sharded_head_tied_or_not_and_its_layers_get_the_gradients_of_the_whole_model():
    assert run_script("sharded_gradients.py", processes=2).count("sharded as whole") == 2


def test_shards_are_clipped_together_with_whole_parameters():
    shard, copy = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    shard.grad, copy.grad = torch.tensor([1.0, 2.0]), torch.tensor([4.0])  # with the other process's shards: norm 3
    assert clip_with(torch.tensor(3.0), [shard], [copy], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat([shard.grad, copy.grad]), torch.tensor([0.2, 0.4, 0.8]))
    assert clip_with(torch.tensor(0.6), [shard], [copy], float("inf")).item() == pytest.approx(1.0)
    torch.testing.assert_close(copy.grad, torch.tensor([0.8]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the Trainer made in one process, and in each of two with a sharded student."""
    folder = tmp_path_factory.mktemp("sharded")
    run_script("train_sharded.py", folder)
    run_script("train_sharded.py", folder, processes=2, **FSDP2)
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clipped", "answering 1.0", "answering 0.5"])
def test_a_sharded_student_its_projections_and_its_own_answers_train_as_in_one_process(trained, name):
    (whole, logs), (sharded, sharded_logs), (other, _) = (each[name] for each in trained)
    assert whole.keys() == sharded.keys() == other.keys()
    for parameter, tensor in whole.items():
        torch.testing.assert_close(sharded[parameter], tensor, rtol=2e-4, atol=2e-5, msg=parameter)
        assert torch.equal(sharded[parameter], other[parameter]), parameter
    for one, two in zip(logs, sharded_logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    if name == "clipped":
        assert all(log["grad_norm"] > 0.5 for log in logs[:4]) and any("-" in parameter for parameter in whole)


@pytest.mark.slow
def test_a_sharded_training_with_projections_resumes_as_if_it_had_not_stopped(trained):
    for run_of in trained:
        (unbroken, logs), (resumed, resumed_logs) = run_of["adam"], run_of["resumed"]
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())
        assert logs[2:4] == resumed_logs[2:4]
