"""How the outputs of a teacher become the bytes of a cache's blocks, and bytes become targets again.

The layout of the bytes stands in `cache_format`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from distill_llm.common.processes import exact_device
from distill_llm.losses.sparse import SparseTargets, entropy_of

MIN_PROBABILITY = 2.0**-10  # the least of a token of a top k, but for the first; less goes to the rest
LEVELS = 50  # steps of a ratio of probabilities
BLOCK = 64  # tokens whose probabilities are summed before one of them is looked for
BELOW_ONE = 1 - 2**-53


class Tokens(NamedTuple):
    """The tokens that items hold: (items,) how many, (items,) a scalar of each item, and of each token gap and number.

    The scalar is the mass of all other tokens (`topk`) or the mean of -log p over the draws, in nats (`sampled`).
    """

    widths: np.ndarray
    scalars: np.ndarray
    gaps: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class ItemCoding:
    """From the logits of items to the bytes of a block and back.

    Args:
        classes: of the logits.
        k, method: as of the settings.
    """

    classes: int
    k: int
    method: str

    @property
    def planes(self) -> int:
        """Bytes of an id."""
        return max(1, -(-(self.classes - 1).bit_length() // 8))

    def encode(self, logits: torch.Tensor, uniforms: np.ndarray) -> Tokens:
        """Choose the tokens of some items.

        Args:
            logits: (items, classes), finite or minus infinity.
            uniforms: (items,) random numbers in [0, 1) that decide the draws.
        """
        logits = logits.to(exact_device(logits.device))
        if self.method == "topk":
            return self._tokens(*self._graded(*logits.float().log_softmax(-1).topk(self.k, dim=-1)))
        return self._tokens(*self._draws(logits.float(), torch.from_numpy(uniforms).to(logits.device)))

    def of_targets(self, targets: SparseTargets) -> Tokens:
        """The tokens of items that are known at some tokens only (`topk`)."""
        p, order = targets.probabilities.sort(-1, descending=True)
        return self._tokens(*self._graded(p.log(), targets.ids.gather(1, order)))

    @staticmethod
    def _tokens(ids: torch.Tensor, numbers: torch.Tensor, held: torch.Tensor, scalars: torch.Tensor) -> Tokens:
        gaps = torch.diff(ids, dim=-1, prepend=torch.zeros_like(ids[:, :1]))
        columns = (held.sum(-1).byte(), scalars, gaps[held].int(), numbers[held].byte())
        return Tokens(*(each.cpu().numpy() for each in columns))

    def _graded(self, log_p: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logs of ratios on a grid that is finest near the top: errors weigh about the same everywhere in a KL.

        Args:
            log_p, ids: (items, k), the most probable token first.
        """
        held = log_p >= math.log(MIN_PROBABILITY)
        held[:, 0] = True
        ratios = (log_p[:, :1] - log_p).nan_to_num(0.0) / -math.log(MIN_PROBABILITY)  # 0 where nothing is known
        numbers = (LEVELS * ratios.clamp(max=1).sqrt()).round().long()
        rest = (1 - (log_p.exp() * held).sum(-1, dtype=torch.float64)).clamp(0, 1).float()
        order = torch.where(held, ids, self.classes).argsort(-1)
        return ids.gather(1, order), numbers.gather(1, order), held.gather(1, order), rest

    def _draws(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """k draws an item at evenly spaced points of the cumulative distribution, moved by one random number.

        A token's expected count is k p, as with independent draws, but its count differs from that by less than one.
        """
        probabilities = torch.nn.functional.pad(logits.softmax(-1), (0, -logits.shape[-1] % BLOCK))
        blocks = probabilities.unflatten(-1, (-1, BLOCK))
        ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
        points = (uniforms[:, None] + torch.arange(self.k, device=logits.device)) / self.k
        points = points.clamp_(max=BELOW_ONE) * ends[:, -1:]
        at = torch.searchsorted(ends, points, right=True)  # the block of each point first, then the token in it
        starts = torch.nn.functional.pad(ends, (1, 0))
        start, size = starts.gather(1, at), torch.diff(starts).gather(1, at)
        inside = blocks.gather(1, at[..., None].expand(-1, -1, BLOCK)).cumsum(-1, dtype=torch.float64)
        share = ((points - start) / size).clamp_(max=BELOW_ONE)
        drawn = torch.searchsorted(inside, share[..., None] * inside[..., -1:], right=True).squeeze(-1)
        drawn += at * BLOCK
        slots = torch.nn.functional.pad((drawn[:, 1:] != drawn[:, :-1]).long().cumsum(-1), (1, 0))
        ids = torch.zeros_like(drawn).scatter_(1, slots, drawn)
        counts = torch.zeros_like(drawn).scatter_add_(1, slots, torch.ones_like(drawn))
        p = probabilities.gather(1, drawn).clamp(min=torch.finfo(torch.float32).tiny)
        return ids, counts, counts > 0, -p.log().mean(-1)

    def join(self, tokens: Tokens) -> bytes:
        """Items as they lie in a block."""
        topk = self.method == "topk"
        scalars = np.rint(tokens.scalars * 65535).astype("<u2") if topk else tokens.scalars.astype("<f2")
        gaps = tokens.gaps.astype("<i4").view(np.uint8).reshape(-1, 4)[:, : self.planes].T
        return tokens.widths.tobytes() + scalars.tobytes() + gaps.tobytes() + tokens.numbers.tobytes()

    def split(self, block: np.ndarray, items: int) -> Tokens:
        """The items of a block (bytes,), its bits left out."""
        scalars = block[items : 3 * items].view("<u2" if self.method == "topk" else "<f2").astype(np.float32)
        if self.method == "topk":
            scalars /= 65535
        columns = block[3 * items :].reshape(self.planes + 1, -1)
        gaps = columns[0].astype(np.int32)
        for plane in range(1, self.planes):
            gaps |= columns[plane].astype(np.int32) << (8 * plane)
        return Tokens(block[:items], scalars, gaps, columns[-1])

    def decode(self, tokens: Tokens) -> SparseTargets:
        """The targets of items, k the largest number of tokens of an item, ids (int32) ascending."""
        if self.method == "topk":
            log_ratios = math.log(MIN_PROBABILITY) * np.square(np.arange(LEVELS + 1) / LEVELS)
            weights, rest = np.exp(log_ratios).astype(np.float32)[tokens.numbers], tokens.scalars
        else:
            weights, rest = tokens.numbers.astype(np.float32), np.zeros_like(tokens.scalars)
        held = np.arange(tokens.widths.max(initial=1)) < tokens.widths[:, None]
        ids = np.zeros(held.shape, dtype=np.int32)
        ids[held] = tokens.gaps
        np.cumsum(ids, axis=1, out=ids)
        p = np.zeros(held.shape, dtype=np.float32)
        p[held] = weights
        p *= ((1 - rest) / p.sum(-1))[:, None]
        held_p, others = torch.from_numpy(p), torch.from_numpy(rest)
        nll = entropy_of(held_p, others) if self.method == "topk" else torch.from_numpy(tokens.scalars)
        return SparseTargets(torch.from_numpy(ids), held_p, others, nll)
