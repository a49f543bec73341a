"""Where the signals that a student learns from come from: `teacher(inputs) -> Signals`.

May import: common, architectures, losses, data, models.
"""

from distill_llm.models.quantized import load_teacher
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.online import OnlineTeacher

__all__ = ["CachedTeacher", "OnlineTeacher", "load_teacher"]
