"""A run without data: what makes its rows, and the rows once they are made."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, load_from_disk
from transformers import PreTrainedModel

from distill_llm.checks.recipe import Opened
from distill_llm.checks.synthetic import read_prompts
from distill_llm.common.errors import raise_all
from distill_llm.data.embeddings import as_arrays
from distill_llm.data.encoding import collator, encode
from distill_llm.data.tasks import TaskData
from distill_llm.evaluation.rules import RECIPE_FIELDS, scoring_faults
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.finding import check_tokens
from distill_llm.models.limits import limits_of
from distill_llm.recipe.synthetic import NoiseSection, SyntheticSection
from distill_llm.synthesis.ascent import Ascent
from distill_llm.synthesis.generator import Adversary, GeneratorSettings
from distill_llm.synthesis.rows import ClimbedRows, GeneratedRows, RowMaker, TextRows
from distill_llm.synthesis.spaces import EmbeddingSpace
from distill_llm.synthesis.texts import TextSettings, TextSource

if TYPE_CHECKING:
    from distill_llm.pipeline.context import Context

FOLDER, GENERATOR, RECORD = "synthetic", "generator.pt", "synthetic.json"
"""In the run folder: the rows of both splits, the generator as it is before there is a student, and what was made."""


def section_of(opened: Opened) -> SyntheticSection:
    """The section of a recipe without data."""
    assert opened.recipe.data.synthetic is not None
    return opened.recipe.data.synthetic


def real_test(opened: Opened) -> Dataset | None:
    """The encoded rows of `data.test`, after a check that the teacher can read them; None where there are none."""
    if opened.recipe.data.test is None:
        return None
    raw, tokenizer = opened.data, opened.teacher.tokenizer
    rows = encode(TaskData(raw.task, raw.test, None, raw.test), tokenizer, opened.recipe.data.max_length)
    data = check_tokens(rows, opened.teacher, RECIPE_FIELDS.rows)
    raise_all(
        scoring_faults(limits_of(opened.teacher.config, opened.teacher.name), data.test, data.task, RECIPE_FIELDS)
    )
    return data.test


def made_rows(folder: Path, split: str) -> Dataset:
    """The rows of a split that the stage `synthetic` left in a run folder."""
    return as_arrays(load_from_disk(str(folder / FOLDER / split)).with_format(None))


def adversary(opened: Opened, teacher: PreTrainedModel) -> Adversary:
    """A new generator for rows of embeddings of a teacher."""
    section = section_of(opened)
    do = section.generator
    assert do is not None
    settings = GeneratorSettings(
        noise=do.noise,
        width=do.width,
        learning_rate=do.learning_rate,
        every=do.every,
        rows=do.batch_size,
        disagreement=do.disagreement,
        balance=do.balance,
        confidence=do.confidence,
        seed=opened.recipe.seed,
    )
    return Adversary(EmbeddingSpace.of(teacher, opened.teacher.tokenizer, section.length), settings)


def learner(run: "Context") -> Adversary:
    """The generator of a recovery: as the stage `synthetic` left it, on this process's device."""
    teacher = run.load(run.teacher_path)
    found = adversary(run.opened, teacher)
    file = run.folder / FOLDER / GENERATOR
    found.load_state_dict(torch.load(file, map_location=run.processes.device, weights_only=True))
    return found


def row_maker(run: "Context", teacher: PreTrainedModel, trained: Adversary | None) -> tuple[RowMaker, int]:
    """What makes a run's rows, and how many it makes together.

    Args:
        teacher: on its device.
        trained: the generator, where the recipe has one.
    """
    opened, section, seed = run.opened, section_of(run.opened), run.recipe.seed
    if section.generator is not None:
        assert trained is not None
        return GeneratedRows(teacher, trained), section.generator.batch_size
    if section.sampled is not None:
        return _texts(run, teacher), section.sampled.batch_size
    do: NoiseSection | None = section.inversion or section.noise
    assert do is not None
    statistics = section.inversion.statistics if section.inversion is not None else None
    space = EmbeddingSpace.of(teacher, opened.teacher.tokenizer, section.length)
    settings = Ascent(do.steps, do.learning_rate, do.prior, statistics)
    return ClimbedRows(teacher, space, settings, seed), do.batch_size


def _texts(run: "Context", teacher: PreTrainedModel) -> TextRows:
    opened, section, task = run.opened, section_of(run.opened), run.opened.data.task
    sampled, found = section.sampled, run.opened.sampler
    assert sampled is not None and found is not None
    tokenizer = found.tokenizer
    model: Any = teacher
    if found is not opened.teacher:
        model = load_pretrained(found.path, dtype=torch.float32).to(run.processes.device)  # type: ignore[arg-type]
    settings = TextSettings(
        section.length,
        sampled.temperature,
        sampled.top_p,
        sampled.top_k,
        sampled.sweeps,
        seed=run.recipe.seed,
    )
    prompts = [tokenizer(line)["input_ids"] for line in read_prompts(sampled.prompts)] if sampled.prompts else []
    source = TextSource(model, tokenizer, settings, prompts)
    if task.is_language_model:
        return TextRows(source, predicts=task.kind.item == "next_token")
    encoder = task.kind.encoder(task, opened.teacher.tokenizer, section.length)

    def encoded(texts: list[str]) -> Dataset:
        return Dataset.from_dict(encoder({task.text_columns[0]: texts, "labels": [0] * len(texts)}))

    return TextRows(source, encoded, teacher, collator(task, opened.teacher.tokenizer, run.recipe.seed))
