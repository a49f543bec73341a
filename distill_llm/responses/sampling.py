"""How responses are drawn, with random numbers that belong to the prompt, not to the batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from distill_llm.common.errors import InputError, raise_all
from distill_llm.losses.responses import sampling_faults


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
        raise_all(sampling_faults(self.max_new_tokens, self.temperature, self.top_p, self.top_k))
        for name, least in (("samples", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(name, value, f"a whole number of at least {least}")
        if self.temperature == 0 and self.samples > 1:
            raise InputError("samples", self.samples, "1 with a temperature of 0: greedy responses are all the same")

    def uniforms(self, keys: list[bytes]) -> np.ndarray | None:
        """(B, max_new_tokens) fp64 in [0, 1), each row by its key alone; None where nothing is drawn."""
        if self.temperature == 0:
            return None
        return np.stack([random_numbers(key).random(self.max_new_tokens) for key in keys])

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


def random_numbers(key: bytes) -> np.random.Generator:
    """The numbers that belong to a key: the same in every process and on every machine."""
    digest = hashlib.blake2b(key, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Known(LogitsProcessor):
    """No token beyond the tokenizer's: a padded vocabulary has rows that mean nothing, and another model may not have them."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) with -inf at what is no token."""
        if scores.shape[1] <= self.tokens:
            return scores
        return scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= self.tokens, -torch.inf)


class Watching(LogitsProcessor):
    """Base of processors that keep a number of each token that is taken.

    Attributes:
        found: of each step, (B,) numbers; those of a row count up to its end.
    """

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []
        self._waiting: torch.Tensor | None = None

    def taken(self, tokens: torch.Tensor) -> None:
        """The tokens (B,) that were taken after the last call, if there was one."""
        if self._waiting is not None:
            self.found.append(self._waiting.gather(1, tokens[:, None].to(self._waiting.device)).squeeze(1))
        self._waiting = None

    def of(self, answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """The numbers of each answer's tokens."""
        columns = torch.stack(self.found, dim=1).tolist() if self.found else [[] for _ in answers]
        return [column[: len(answer)] for column, answer in zip(columns, answers, strict=True)]


class Likelihood(Watching):
    """Keeps the logarithm of each taken token's probability under the model itself, whatever the answers are drawn from."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) as they are."""
        self.taken(input_ids[:, -1])
        self._waiting = scores.log_softmax(-1, dtype=torch.float32)
        return scores


def drawn(scores: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(B, 1) tokens: in whose span of the cumulative distribution of `scores` (B, V) the numbers (B,) in [0, 1) lie."""
    exact = scores.to(points.device)
    cumulative = exact.softmax(-1, dtype=torch.float64).cumsum(-1)
    found = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True)
    return found.clamp_(max=scores.shape[1] - 1).to(scores.device)


class Draw(LogitsProcessor):
    """Leaves one token a row: the one in whose span of the cumulative distribution the row's random number lies.

    A greedy search behind it then takes this token. Two runs whose logits differ by rounding draw the same token unless
    the number lies within the rounding of an edge.

    Args:
        uniforms: (B, steps) fp64 in [0, 1), on the `exact_device` of the scores; None leaves the scores as they are.
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
        points = self.uniforms[:, input_ids.shape[1] - self.prompt_tokens]
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn(scores, points), 0.0)
