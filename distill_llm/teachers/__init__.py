"""Where the signals that a student learns from come from: a kind of teacher a file, behind one protocol (`base.Teacher`).

May import: common, architectures, losses, data, models.
"""

from distill_llm.losses.terms.term import Gives
from distill_llm.models.quantized import load_teacher
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.by_row import ByRow
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.checkpoints import StagedTeacher
from distill_llm.teachers.cross_tokenizer import CrossTokenizerTeacher
from distill_llm.teachers.ensemble import Ensemble
from distill_llm.teachers.moving_average import MovingAverage
from distill_llm.teachers.online import OnlineTeacher
from distill_llm.teachers.peers import Peers
from distill_llm.teachers.served import ServedTeacher
from distill_llm.teachers.wrapping import as_teacher

__all__ = [
    "ByRow",
    "CachedTeacher",
    "CrossTokenizerTeacher",
    "Ensemble",
    "Gives",
    "MovingAverage",
    "OnlineTeacher",
    "Peers",
    "ServedTeacher",
    "StagedTeacher",
    "Teacher",
    "as_teacher",
    "load_teacher",
]
