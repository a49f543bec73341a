"""Tasks, where their rows come from, and how rows become batches.

May import: common, architectures, metrics, losses.
"""

from distill_llm.data.encoding import collator, encode
from distill_llm.data.loading import TASKS, load_task
from distill_llm.data.sources import resolve_path
from distill_llm.data.tasks import GLUE, Task, TaskData

__all__ = ["GLUE", "TASKS", "Task", "TaskData", "collator", "encode", "load_task", "resolve_path"]
