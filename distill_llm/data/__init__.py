"""Tasks, where their rows come from, and how rows become batches.

May import: common, architectures, metrics, losses.
"""

from distill_llm.data.encoding import collator, encode
from distill_llm.data.glue import GLUE
from distill_llm.data.loading import load_task, task_names
from distill_llm.data.sources import resolve_path
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import Task, TaskData

__all__ = [
    "GLUE",
    "DataSpec",
    "Task",
    "TaskData",
    "collator",
    "encode",
    "load_task",
    "resolve_path",
    "task_names",
]
