"""Each of two processes compares the gradients of a sharded student with those of the whole one, and says so."""

import os

import torch
import torch.distributed as dist
from builders.trainers import TERMS, causal_model, rows
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distill_llm.losses.objective import parse_objective
from distill_llm.teachers import as_teacher
from distill_llm.training import shards
from distill_llm.training.loss import TrainingLoss

dist.init_process_group("gloo")
rank = dist.get_rank()
teacher = causal_model()
data = rows(teacher, count=8)
halves = [{name: torch.stack([row[name] for row in part]) for name in data[0]} for part in (data[:4], data[4:])]


def shard(student, own_head):
    """Each layer a shard group, the head too where it is to be one, and the rest."""
    for layer in student.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    if own_head:
        fully_shard(student.lm_head, reshard_after_forward=True)
    fully_shard(student, reshard_after_forward=True)


def compare(tied, own_head, name):
    student = causal_model(layers=2, seed=1, tie_word_embeddings=tied).train()
    loss = TrainingLoss(parse_objective(TERMS[name]), student, as_teacher(teacher), None, torch.device("cpu"))
    assert (loss.head_terms is None) == (name == "hidden")
    factors = {name: torch.tensor(0.01) for name in loss.objective.terms()}
    expected = sum(loss(student, half, factors, 0, 1)[0] for half in halves) / 2
    expected.backward()
    whole = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    shard(student, own_head)
    with shards.whole(student), torch.no_grad():
        assert not any(isinstance(parameter, DTensor) for parameter in student.parameters())
        for _ in range(1 + rank):  # as answers of other lengths in each process
            student(halves[rank]["input_ids"])
    assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
    loss(student, halves[rank], factors, 0, 1)[0].backward()
    for parameter_name, parameter in student.named_parameters():
        found = parameter.grad.full_tensor()
        torch.testing.assert_close(found, whole[parameter_name], rtol=1e-4, atol=1e-6, msg=parameter_name)


for tied, own_head in ((False, False), (False, True), (True, False)):
    for name in ("all", "hidden"):
        compare(tied, own_head, name)
print("sharded as whole", flush=True)
dist.barrier()
os._exit(0)  # gloo's threads abort the interpreter's exit now and then
