"""Terms of the relations between the rows of all processes, which have 4 rows and 1: saved as FOLDER/RANK.pt.

Usage: relate_in_processes.py FOLDER NAME ..., where FOLDER/states.pt has the states of all rows by student and teacher. By name,
the value and its gradient in a matrix by which the student's states are multiplied.
"""

import sys
from pathlib import Path

import torch
from torch import distributed

from distill_llm.losses.examples import over_examples
from distill_llm.losses.objective import parse_objective

folder, names = Path(sys.argv[1]), sys.argv[2:]
distributed.init_process_group("gloo")
rank = distributed.get_rank()
student, teacher = (each.split([4, 1])[rank] for each in torch.load(folder / "states.pt"))
found = {}
for name in names:
    weight = torch.eye(student.shape[1], dtype=student.dtype, requires_grad=True)
    relation = parse_objective({name: {}}).terms()[name].of_examples
    value = over_examples(relation, student @ weight, teacher, gathered=True)
    found[name] = value.detach(), *torch.autograd.grad(value, weight)
torch.save(found, folder / f"{rank}.pt")
distributed.destroy_process_group()
