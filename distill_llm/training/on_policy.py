"""On-policy batches: the student answers the prompts of a batch, and the teacher judges its answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.processes import exact_device
from distill_llm.data.causal import CausalCollator
from distill_llm.losses.labels import IGNORED
from distill_llm.losses.responses import Responses
from distill_llm.losses.terms.term import Use
from distill_llm.models.inputs import packed_sequences
from distill_llm.responses.decoding import Decoder
from distill_llm.responses.sampling import Sampling, random_numbers
from distill_llm.teachers.base import Teacher
from distill_llm.training.proposals import Alongside, Mixed, Replaced

MARK = "on_policy"  # an entry of a batch that the student answered
ANSWERED = "answered_rows"
"""(B,) of bool: which rows of a batch have answers of the student; in every batch of a step that has some."""
IMPORTANCE = "importance"
"""(B, T) in fp32: what the comparison of the output that predicts a token is multiplied by."""
TEACHER_SHARE, CLIP, ACCEPTED = 0.2, 2.0, 25
"""What `Responses` has where it says nothing."""


class StudentResponses:
    """Replaces the responses of a share of the batches by the student's own (GKD, Agarwal et al., 2024, algorithm 1).

    The student answers all batches of an optimizer step or none. Which steps depends on the seed and the step alone. The random
    numbers of a row depend on the seed, the step and the row's place in the global batch: they are the same however that
    batch is split into micro-batches and over processes, and after a resume. A prompt that occurs twice in it gets two answers.
    The teacher may write with the student (see `distill_llm.training.proposals`).

    Args:
        settings: the share, and how answers are drawn.
        collator: of the task `prompts`.
        seed: of the choice of batches and of the draws.
        teacher: where it writes too.

    Raises:
        InputError: the collator is not of prompts.
    """

    def __init__(self, settings: Responses, collator: object, seed: int, teacher: Teacher | None = None):
        if not isinstance(collator, CausalCollator):
            given = type(collator).__name__
            raise InputError(
                "losses.responses", given, "data of the task prompts as load_task reads them, with their collator"
            )
        self.settings, self.share, self.collator, self.seed = settings, settings.share, collator, seed
        self.sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)
        self.teacher = teacher

    def chosen(self, step: int) -> bool:
        """Whether the student answers the batches of this optimizer step: the same in all processes."""
        return random_numbers(f"{self.seed} {step}".encode()).random() < self.share

    def __call__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], step: int, first: int = 0
    ) -> dict[str, torch.Tensor]:
        """The batch with the student's answers in the place of its responses, on the same device, and marked.

        Where answers stand beside the data, the rows of the data come first.

        Args:
            model: the student, unwrapped; its mode comes back afterwards.
            batch: `input_ids`, `attention_mask`, `labels` (B, T), labels at the responses, prompts before them.
            step: optimizer steps done.
            first: place of the first row in the global batch of the step.

        Raises:
            InputError: a packed batch, rows without prompts, or logits of the student that are not numbers.
        """
        if packed_sequences(model, batch) is not None:
            raise_all([fault.renamed("losses.responses") for fault in self.settings.faults(Use(packed="position_ids"))])
        device, size = batch["input_ids"].device, len(batch["input_ids"])
        prompts = [_prompt(batch, row) for row in range(size)]
        if not all(prompts):
            raise InputError(
                "losses.responses", "rows without a prompt", "data of the task prompts, where labels follow each prompt"
            )
        inside: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore
        decoder = Decoder(inside, self.collator, self.sampling, "student")
        guide = _Guide(self, [f"{self.seed} {step} {place}" for place in range(first, first + size)])
        with decoder.ready(), guide.ready():
            answers = decoder(prompts, guide.uniforms, guide=guide if self.settings.by != "student" else None)
        rows = [_row(batch, row) for row in range(size)] if self.settings.beside else []
        rows += [
            {
                "input_ids": [*prompt, *answer],
                "attention_mask": [1] * (len(prompt) + len(answer)),
                "labels": [IGNORED] * len(prompt) + answer,
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        made = {name: values.to(device) for name, values in self.collator(rows).items() if name in batch}
        made[ANSWERED] = torch.arange(len(rows), device=device) >= len(rows) - size
        if (weights := guide.weights(answers)) is not None:
            made[IMPORTANCE] = torch.ones(made["input_ids"].shape, device=device)
            for row, (prompt, each) in enumerate(zip(prompts, weights, strict=True), len(rows) - size):
                made[IMPORTANCE][row, len(prompt) : len(prompt) + len(each)] = torch.tensor(each, device=device)
        return made if self.settings.beside else {**made, MARK: torch.ones((), dtype=torch.bool)}


class _Guide:
    """What a batch is drawn with: the random numbers of its rows, and the teacher's part.

    Args:
        responses: whose settings and teacher these are.
        keys: of the rows.
    """

    def __init__(self, responses: StudentResponses, keys: list[str]):
        self.settings, self.sampling = responses.settings, responses.sampling
        self.tokens, self.keys = responses.collator.tokens, keys
        teacher = responses.teacher.model if responses.teacher is not None else None
        self.model: Any = teacher if self.settings.by != "student" else None
        self.uniforms = self._drawn("")
        self.mixed: Mixed | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """With a teacher that writes in evaluation mode."""
        if self.model is None:
            yield
            return
        with evaluating(self.model):
            yield

    def __call__(self, mask: torch.Tensor) -> LogitsProcessor:
        """What the teacher does to the scores, for prompts with this mask."""
        settings, device = self.settings, self.model.device
        alongside = Alongside(self.model, mask.to(device), self.tokens)
        if settings.by == "mixed":
            self.mixed = Mixed(alongside, settings.teacher_share or TEACHER_SHARE, settings.temperature)
            return self.mixed
        found = self._drawn(" proposals")
        points = None if found is None else torch.from_numpy(found).to(exact_device(mask.device))
        return Replaced(alongside, settings.accepted or ACCEPTED, settings.temperature, points)

    def weights(self, answers: list[list[int]]) -> list[list[float]] | None:
        """The importance weights of the answers' tokens, none larger than `clip`; None where there are none."""
        if self.mixed is None:
            return None
        clip = self.settings.clip or CLIP
        return [[min(each, clip) for each in row] for row in self.mixed.of(answers)]

    def _drawn(self, what: str) -> np.ndarray | None:
        return self.sampling.uniforms([f"{key}{what}".encode() for key in self.keys])


def _prompt(batch: dict[str, torch.Tensor], row: int) -> list[int]:
    """The valid tokens of a row before its first label."""
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    valid = batch["attention_mask"][row].bool()
    answered = (labels != IGNORED).nonzero().flatten()
    end = int(answered[0]) if len(answered) else len(ids)
    return ids[:end][valid[:end]].tolist()


def _row(batch: dict[str, torch.Tensor], row: int) -> dict[str, list[int]]:
    """A row as it is, without padding."""
    valid = batch["attention_mask"][row].bool()
    return {name: batch[name][row][valid].tolist() for name in ("input_ids", "attention_mask", "labels")}
