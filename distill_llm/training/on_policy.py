"""On-policy batches: the student answers the prompts of a batch, and the teacher judges its answers."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.causal import CausalCollator
from distill_llm.losses.labels import IGNORED
from distill_llm.losses.objective import Responses
from distill_llm.losses.terms.term import Use
from distill_llm.models.inputs import packed_sequences
from distill_llm.responses.decoding import Decoder
from distill_llm.responses.sampling import Sampling, random_numbers

MARK = "on_policy"  # an entry of a batch that the student answered


class StudentResponses:
    """Replaces the responses of a share of the batches by the student's own (GKD, Agarwal et al., 2024, algorithm 1).

    The student answers all batches of an optimizer step or none. Which steps depends on the seed and the step alone. The random
    numbers of a row depend on the seed, the step and the row's place in the global batch: they are the same however that
    batch is split into micro-batches and over processes, and after a resume. A prompt that occurs twice in it gets two answers.

    Args:
        settings: the share, and how answers are drawn.
        collator: of the task `prompts`.
        seed: of the choice of batches and of the draws.

    Raises:
        InputError: the collator is not of prompts.
    """

    def __init__(self, settings: Responses, collator: object, seed: int):
        if not isinstance(collator, CausalCollator):
            given = type(collator).__name__
            raise InputError(
                "losses.responses", given, "data of the task prompts as load_task reads them, with their collator"
            )
        self.settings, self.share, self.collator, self.seed = settings, settings.share, collator, seed
        self.sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)

    def chosen(self, step: int) -> bool:
        """Whether the student answers the batches of this optimizer step: the same in all processes."""
        return random_numbers(f"{self.seed} {step}".encode()).random() < self.share

    def __call__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], step: int, first: int = 0
    ) -> dict[str, torch.Tensor]:
        """The batch with the student's answers in the place of its responses, on the same device, and marked.

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
        device = batch["input_ids"].device
        prompts = [_prompt(batch, row) for row in range(len(batch["input_ids"]))]
        if not all(prompts):
            raise InputError(
                "losses.responses", "rows without a prompt", "data of the task prompts, where labels follow each prompt"
            )
        inside: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore
        decoder = Decoder(inside, self.collator, self.sampling, "student")
        with decoder.ready():
            answers = decoder(prompts, self._uniforms(step, range(first, first + len(prompts))))
        rows = [
            {
                "input_ids": [*prompt, *answer],
                "attention_mask": [1] * (len(prompt) + len(answer)),
                "labels": [IGNORED] * len(prompt) + answer,
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        made = {name: values.to(device) for name, values in self.collator(rows).items() if name in batch}
        return {**made, MARK: torch.ones((), dtype=torch.bool)}

    def _uniforms(self, step: int, places: range) -> np.ndarray | None:
        return self.sampling.uniforms([f"{self.seed} {step} {place}".encode() for place in places])


def _prompt(batch: dict[str, torch.Tensor], row: int) -> list[int]:
    """The valid tokens of a row before its first label."""
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    valid = batch["attention_mask"][row].bool()
    answered = (labels != IGNORED).nonzero().flatten()
    end = int(answered[0]) if len(answered) else len(ids)
    return ids[:end][valid[:end]].tolist()
