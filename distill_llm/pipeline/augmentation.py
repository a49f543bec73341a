"""The student's training rows and collator where a recipe augments them."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.checks.recipe import Opened
from distill_llm.common.processes import open_processes
from distill_llm.data.augmenting import Augment, AugmentingCollator, Mixup, Replace, Spans
from distill_llm.data.padding import Collator
from distill_llm.models.candidates import WordSource
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.recipe.augment import AugmentSection


def augmented(opened: Opened, rows: Dataset, plain: Collator) -> tuple[Dataset, Collator]:
    """The rows with what replacing needs of them, and a collator that changes them; as they are where nothing is asked for.

    Process 0 looks for words; the others read what it found.

    Args:
        rows: encoded, of the training.
        plain: makes batches of them.
    """
    section, recipe = opened.recipe.data.augment, opened.recipe
    if section is None:
        return rows, plain
    if section.replace is not None:
        with open_processes().main_process_first():
            rows = _words(opened, section.replace.candidates).add_to(rows)
    return rows, AugmentingCollator(plain, rows, opened.reader.tokenizer, settings_of(section), recipe.seed)


def settings_of(section: AugmentSection) -> Augment:
    """The settings of a section."""
    replace, backoff, cutout, mixup = section.replace, section.backoff, section.cutout, section.mixup
    return Augment(
        section.share,
        section.labels == "keep",
        replace=Replace(replace.share) if replace else None,
        backoff=Spans(backoff.share, backoff.length) if backoff else None,
        cutout=Spans(cutout.share, cutout.length) if cutout else None,
        mixup=Mixup(mixup.alpha) if mixup else None,
    )


def _words(opened: Opened, count: int) -> WordSource:
    """Candidates from the embeddings of the teacher as it was given, and from the masked LM if there is one."""
    given = opened.teacher
    teacher: PreTrainedModel = load_pretrained(given.path, given.trust_remote_code)
    embeddings: Any = teacher.get_input_embeddings()
    model = None
    if opened.masked_lm is not None:
        model = load_pretrained(opened.masked_lm.path).eval()
        model.to(open_processes().device)  # type: ignore[arg-type, operator]
    identity = [teacher_fingerprint(teacher), None if model is None else teacher_fingerprint(model)]
    return WordSource(given.tokenizer, embeddings.weight.detach().cpu(), count, model, identity)
