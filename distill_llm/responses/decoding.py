"""Responses to a batch of prompts, greedy or drawn with random numbers that belong to the prompt, not to the batch."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distill_llm.data.causal import IGNORED, CausalCollator
from distill_llm.data.special_tokens import document_end
from distill_llm.errors import InputError
from distill_llm.responses.prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: most tokens of a response, its end token among them.
        temperature: divides the logits; 0 is greedy.
        top_p: draw from the most probable tokens that have this much mass together (Holtzman et al., 2020); 1: from all.
        top_k: draw from the k most probable tokens; 0: from all.
        samples: responses to each prompt.
        seed: of all random numbers.

    Raises:
        InputError: names the value that is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"max_new_tokens": 1, "top_k": 0, "samples": 1, "seed": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(name, value, f"a whole number of at least {least}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError("temperature", self.temperature, "a number of at least 0; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", self.top_p, "a number over 0 and at most 1")
        if self.temperature == 0 and self.samples > 1:
            raise InputError("samples", self.samples, "1 with a temperature of 0: greedy responses are all the same")

    def uniforms(self, prompt: bytes, sample: int) -> np.ndarray:
        """(max_new_tokens,) fp64 in [0, 1): they depend on the prompt's key, the number of the sample and the seed."""
        content = hashlib.blake2b(prompt + f"{sample} {self.seed}".encode(), digest_size=16)
        key = int.from_bytes(content.digest(), "little")
        return np.random.Generator(np.random.Philox(key=key)).random(self.max_new_tokens)

    def warpers(self) -> list[LogitsProcessor]:
        """What `generate` does to the scores (B, V) before it draws, in its order."""
        warpers: list[LogitsProcessor] = []
        if self.temperature not in (0, 1):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.temperature and self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


@dataclass(frozen=True)
class Response:
    """Text without special tokens; why it ended; tokens generated, the end token among them."""

    text: str
    finish_reason: Literal["eos", "length"]
    tokens: int


class Draw(LogitsProcessor):
    """Leaves one token a row: the one in whose span of the cumulative distribution the row's random number lies.

    A greedy search behind it then takes this token. Two runs whose logits differ by rounding draw the same token unless
    the number lies within the rounding of an edge.

    Args:
        uniforms: (B, steps) fp64 in [0, 1); None leaves the scores as they are.
        prompt_tokens: width of the prompts, padding included.
    """

    def __init__(self, uniforms: torch.Tensor | None, prompt_tokens: int):
        self.uniforms, self.prompt_tokens = uniforms, prompt_tokens
        self.broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) with the drawn token's 0 and all others -inf."""
        broken = scores.isnan().any()  # looked at when the batch is done: the device need not wait
        self.broken = broken if self.broken is None else self.broken | broken
        if self.uniforms is None:
            return scores
        cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        points = self.uniforms[:, input_ids.shape[1] - self.prompt_tokens, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, points, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class Decoder:
    """Generates with a model under fixed settings.

    Generation ends at the tokenizer's EOS, at the ends that the model's generation config names, or after
    `max_new_tokens`; nothing else of that config counts.

    Args:
        model: a causal LM, on its device.
        collator: of the task `prompts`, for padding on the left and for text.
        sampling: the settings.
    """

    def __init__(self, model: PreTrainedModel, collator: CausalCollator, sampling: Sampling):
        self.model, self.collator, self.sampling = model, collator, sampling
        own = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = {document_end(collator.tokenizer), *(own if isinstance(own, list) else [own])} - {None}
        self.ends = sorted(int(end) for end in ends if end is not None)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in evaluation mode with plain greedy decoding; both come back afterwards."""
        before, training = self.model.generation_config, self.model.training
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.collator.pad,
        )
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.generation_config = before
            self.model.train(training)

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[int]) -> list[Response]:
        """The response to each prompt that has the number in `samples`; call it inside `ready`.

        Raises:
            InputError: naming `teacher`, where its logits are not numbers.
        """
        rows = [{"input_ids": prompt.ids, "labels": [IGNORED] * len(prompt.ids)} for prompt in prompts]
        batch = {name: values.to(self.model.device) for name, values in self.collator.prompts(rows).items()}
        width = batch["input_ids"].shape[1]
        draw = Draw(self._uniforms(prompts, samples), width)
        processors = LogitsProcessorList([*self.sampling.warpers(), draw])
        output = self.model.generate(**batch, logits_processor=processors)[:, width:].tolist()  # type: ignore[operator]
        if draw.broken is not None and draw.broken.item():
            given = f"{self.model.config.model_type} in {self.model.dtype} with logits that are not numbers"
            raise InputError("teacher", given, "a teacher that works in this dtype, or another dtype")
        return [self._response(ids) for ids in output]

    def _uniforms(self, prompts: Sequence[Prompt], samples: Sequence[int]) -> torch.Tensor | None:
        if self.sampling.temperature == 0:
            return None
        rows = [self.sampling.uniforms(prompt.key, sample) for prompt, sample in zip(prompts, samples, strict=True)]
        return torch.from_numpy(np.stack(rows)).to(self.model.device)

    def _response(self, ids: list[int]) -> Response:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        if end is None:
            return Response(self.collator.text(ids), "length", len(ids))
        return Response(self.collator.text(ids[:end]), "eos", end + 1)
