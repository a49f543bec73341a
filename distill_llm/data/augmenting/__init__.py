"""Rows changed anew in every epoch, to be taught by the teacher: words replaced, backed off or cut out, examples mixed."""

from distill_llm.data.augmenting.collator import AugmentingCollator
from distill_llm.data.augmenting.settings import Augment, Mixup, Replace, Spans
from distill_llm.data.augmenting.words import Words

__all__ = ["Augment", "AugmentingCollator", "Mixup", "Replace", "Spans", "Words"]
