"""Where the signals that a student learns from come from: `teacher(inputs) -> Signals`."""

from distill_llm.teachers.online import OnlineTeacher

__all__ = ["OnlineTeacher"]
