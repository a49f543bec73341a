"""On-policy batches: the student answers the prompts of a batch, and learns from what the teacher says of its answers."""

import hashlib
from collections import Counter

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from distill_llm.data.causal import IGNORED, CausalCollator
from distill_llm.data.special_tokens import document_end
from distill_llm.errors import InputError
from distill_llm.losses.objective import Responses
from distill_llm.responses.decoding import Draw, Sampling

MARK = "on_policy"  # an entry of a batch that the student answered


class StudentResponses:
    """Replaces the responses of a share of the batches by the student's own (GKD, Agarwal et al., 2024, algorithm 1).

    All batches of an optimizer step or none are the student's. Which steps, and what is drawn, depends on the seed, the step and
    the prompt: a resumed training draws what the unbroken one did.

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
                "losses.responses", given, "data of the task prompts, with the collator that load_task's data have"
            )
        self.settings, self.collator, self.seed = settings, collator, seed
        end = document_end(collator.tokenizer)
        self.ends = [end] if end is not None else []

    def chosen(self, step: int) -> bool:
        """Whether the student answers the batches of this optimizer step: the same on all processes, however they are split."""
        return float(_generator(f"{self.seed} {step}".encode()).random()) < self.settings.share

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """The batch with the student's answers in the place of its responses, on the same device, and marked.

        Args:
            model: the student, unwrapped; its mode comes back afterwards.
            batch: `input_ids`, `attention_mask`, `labels` (B, T), labels at the responses, prompts before them.
            step: optimizer steps done.

        Raises:
            InputError: a packed batch.
        """
        if "position_ids" in batch:
            raise InputError("data.packing", True, "false with losses.responses: prompts must be rows of their own")
        device = batch["input_ids"].device
        prompts = [_prompt(batch, row) for row in range(len(batch["input_ids"]))]
        if not all(prompts):
            raise InputError(
                "losses.responses", "rows without a prompt", "data of the task prompts: labels after each prompt"
            )
        answers = self._answers(model, prompts, step, device)
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

    def _answers(self, model: nn.Module, prompts: list[list[int]], step: int, device: torch.device) -> list[list[int]]:
        inside: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore
        own = inside.generation_config.eos_token_id if inside.generation_config is not None else None
        ends = sorted({*self.ends, *(own if isinstance(own, list) else [own])} - {None})
        settings = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=self.collator.pad,
        )
        rows = [{"input_ids": ids, "labels": [IGNORED] * len(ids)} for ids in prompts]
        inputs = {name: values.to(device) for name, values in self.collator.prompts(rows).items()}
        width, training = inputs["input_ids"].shape[1], model.training
        sampling = Sampling(
            self.settings.max_new_tokens, self.settings.temperature, self.settings.top_p, self.settings.top_k
        )
        known = len(self.collator.tokenizer)
        processors = LogitsProcessorList(
            [_Known(known), *sampling.warpers(), Draw(self._uniforms(prompts, step, device), width)]
        )
        before, inside.generation_config = inside.generation_config, settings
        model.eval()
        try:
            with torch.no_grad():
                output = inside.generate(**inputs, logits_processor=processors)[:, width:].tolist()  # type: ignore[operator]
        finally:
            inside.generation_config = before
            model.train(training)
        return [_ended(ids, ends) for ids in output]

    def _uniforms(self, prompts: list[list[int]], step: int, device: torch.device) -> torch.Tensor | None:
        if self.settings.temperature == 0:
            return None
        seen: Counter[tuple[int, ...]] = Counter()
        keys = []
        for ids in prompts:
            again = seen[tuple(ids)]  # the same prompt twice gets two answers
            seen[tuple(ids)] += 1
            keys.append(np.asarray(ids, dtype="<u4").tobytes() + f"{self.seed} {step} {again}".encode())
        drawn = [_generator(key).random(self.settings.max_new_tokens) for key in keys]
        return torch.from_numpy(np.stack(drawn)).to(device)


class _Known(LogitsProcessor):
    """No token beyond the tokenizer's: a padded vocabulary has rows that mean nothing, and a teacher may not have them."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[1] <= self.tokens:
            return scores
        return scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= self.tokens, -torch.inf)


def _generator(content: bytes) -> np.random.Generator:
    key = int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def _prompt(batch: dict[str, torch.Tensor], row: int) -> list[int]:
    """The valid tokens of a row before its first label."""
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    valid = batch["attention_mask"][row].bool()
    answered = (labels != IGNORED).nonzero().flatten()
    end = int(answered[0]) if len(answered) else len(ids)
    return ids[:end][valid[:end]].tolist()


def _ended(ids: list[int], ends: list[int]) -> list[int]:
    """An answer up to its end token, which belongs to it; the padding after it does not."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if end is None else ids[: end + 1]
