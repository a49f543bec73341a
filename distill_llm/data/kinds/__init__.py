"""Kinds of tasks, one a file: all that reading, encoding, training, scoring and reporting have to know of each.

A new kind is a file here and a row in FILES; docs/development/add-a-task.md shows one.
"""

from importlib import import_module

from distill_llm.data.kinds.base import KINDS, TaskKind, kind_of_head, register

FILES = ("classification", "regression", "masked_lm", "causal_lm", "prompts")
"""The files of the kinds, in the order in which messages list them; importing one registers its kind."""

for _file in FILES:
    import_module(f"{__name__}.{_file}")

__all__ = ["KINDS", "TaskKind", "kind_of_head", "register"]
