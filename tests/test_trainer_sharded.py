"""Sharded over two processes (FSDP2), a language model gets the gradients of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from trainer_examples import TERMS, causal_model, rows
from distill_llm.losses.objective import parse_objective
from distill_llm.training_loss import TrainingLoss
dist.init_process_group("gloo")
rank = dist.get_rank()
teacher = causal_model()
data = rows(teacher, count=8)
halves = [{{name: torch.stack([row[name] for row in part]) for name in data[0]}} for part in (data[:4], data[4:])]
for tied in (False, True):
    for own in (False, True):
        for name in ("all", "hidden"):
            student = causal_model(layers=2, seed=1, tie_word_embeddings=tied).train()
            loss = TrainingLoss(parse_objective(TERMS[name]), student, teacher, None, torch.device("cpu"))
            assert (loss.head_terms is None) == (name == "hidden")
            factors = {{name: torch.tensor(0.01) for name in loss.objective.terms()}}
            expected = sum(loss(student, half, factors, 0, 1)[0] for half in halves) / 2
            expected.backward()
            whole = {{name: parameter.grad.clone() for name, parameter in student.named_parameters()}}
            student.zero_grad()
            for layer in student.model.layers:
                fully_shard(layer, reshard_after_forward=True)
            if own and not tied:
                fully_shard(student.lm_head, reshard_after_forward=True)
            fully_shard(student, reshard_after_forward=True)
            loss(student, halves[rank], factors, 0, 1)[0].backward()
            for parameter_name, parameter in student.named_parameters():
                found = parameter.grad.full_tensor()
                torch.testing.assert_close(found, whole[parameter_name], rtol=1e-4, atol=1e-6, msg=parameter_name)
print("sharded as whole")
dist.destroy_process_group()
"""


def test_a_sharded_head_tied_or_not_and_its_layers_get_the_gradients_of_the_whole_model(tmp_path):
    pytest.importorskip("torch.distributed.fsdp")
    root, script = Path(__file__).parents[1], tmp_path / "shard.py"
    script.write_text(SCRIPT.format(path=[str(root), str(root / "tests")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded as whole") == 2
