"""Where the signals that a student learns from come from: `teacher(inputs) -> Signals`."""

from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.online import OnlineTeacher
from distill_llm.teachers.quantized import load_teacher

__all__ = ["CachedTeacher", "OnlineTeacher", "load_teacher"]
