"""Texts sampled from a language model, causal or masked: a row's numbers belong to the row, not to its batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.architectures.modes import evaluating
from distill_llm.common.errors import InputError
from distill_llm.common.processes import exact_device
from distill_llm.data.causal import CausalCollator
from distill_llm.data.special_tokens import token_count
from distill_llm.losses.items import kind_of
from distill_llm.models.inputs import forward_inputs
from distill_llm.responses.decoding import Decoder
from distill_llm.responses.sampling import Sampling, random_numbers
from distill_llm.synthesis.spaces import frame_of


@dataclass(frozen=True)
class TextSettings:
    """How texts are drawn.

    Attributes:
        length: most tokens of a text, special tokens and prompt included.
        temperature, top_p, top_k: see `distill_llm.responses.Sampling`; of a masked LM the temperature alone counts.
        sweeps: of a masked LM, how often each token is drawn.
        passes: of a masked LM, forwards in a sweep: in each, one token of so many is hidden and drawn.
        seed: of all numbers.
    """

    length: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    sweeps: int = 2
    passes: int = 8
    seed: int = 0


class TextSource:
    """Draws texts from a language model.

    A causal LM goes on from its begin token, or from a prompt, until it ends the text or `length` is reached (data-free rows of
    LLM-QAT, Liu et al., 2023). A masked LM fills a text of masks of a length that is drawn, a part of the places at a time, and
    then draws each again in the others' presence (Gibbs sampling; Wang and Cho, 2019).

    Args:
        model: with a head for causal or masked LM, on its device.
        tokenizer: the model's.
        settings: see `TextSettings`.
        prompts: token ids that texts begin with, one after the other; a causal LM's alone.

    Raises:
        InputError: a causal LM without a begin token or prompts, or a masked LM without a mask token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TextSettings,
        prompts: Sequence[list[int]] = (),
    ):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.causal = kind_of(model) == "next_token"
        begin = begin_of(tokenizer)
        self.prompts = list(prompts) or ([] if begin is None else [[begin]])
        if self.causal and not self.prompts:
            raise InputError("prompts", None, fix="give prompts: the tokenizer has no token that begins or ends a text")
        if not self.causal and tokenizer.mask_token_id is None:
            raise InputError("tokenizer", "no mask token", "the tokenizer of a masked LM")

    def __call__(self, rows: Sequence[int]) -> list[list[int]]:
        """The token ids of the texts of these numbers, with the model's special tokens."""
        return self._continued(rows) if self.causal else self._filled(rows)

    def _continued(self, rows: Sequence[int]) -> list[list[int]]:
        do = self.settings
        prompts = [self.prompts[row % len(self.prompts)][: do.length - 1] for row in rows]
        new = do.length - min(map(len, prompts))
        sampling = Sampling(new, do.temperature, do.top_p, do.top_k, seed=do.seed)
        decoder = Decoder(self.model, CausalCollator(self.tokenizer), sampling)
        with decoder.ready():
            answers = decoder(prompts, sampling.uniforms([f"text {do.seed} {row}".encode() for row in rows]))
        return [[*prompt, *answer][: do.length] for prompt, answer in zip(prompts, answers, strict=True)]

    def _filled(self, rows: Sequence[int]) -> list[list[int]]:
        do, (before, behind) = self.settings, frame_of(self.tokenizer)
        most = do.length - len(before) - len(behind)
        draws = [random_numbers(f"text {do.seed} {row}".encode()) for row in rows]
        lengths = [int(each.integers(max(1, most // 2), most + 1)) for each in draws]
        ids = [[*before, *[self.tokenizer.mask_token_id] * length, *behind] for length in lengths]
        pad = self.tokenizer.pad_token_id or 0
        width = max(map(len, ids))
        filled = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], device=self.model.device)
        valid = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=self.model.device)
        for _ in range(do.sweeps):
            turns = torch.full(filled.shape, -1)
            for number, (length, draw) in enumerate(zip(lengths, draws, strict=True)):
                turns[number, len(before) : len(before) + length] = torch.from_numpy(
                    draw.permutation(length) % do.passes
                )
            for turn in range(do.passes):
                chosen = turns == turn
                points = [draw.random(int(count)) for draw, count in zip(draws, chosen.sum(-1).tolist(), strict=True)]
                self._draw(filled, valid, chosen, np.concatenate(points))
        return [row[:length] for row, length in zip(filled.tolist(), map(len, ids), strict=True)]

    def _draw(self, ids: Tensor, valid: Tensor, chosen: Tensor, points: np.ndarray) -> None:
        """Hide the chosen places (B, T) of `ids` and draw them anew, all at once, with numbers in [0, 1), one for each."""
        if not len(points):
            return
        where = chosen.to(ids.device)
        ids[where] = self.tokenizer.mask_token_id
        with evaluating(self.model), torch.no_grad():
            inputs = forward_inputs(self.model, {"input_ids": ids, "attention_mask": valid})
            logits = self.model(**inputs).logits[where].to(exact_device(ids.device), torch.float64)
        logits[:, token_count(self.tokenizer) :] = -torch.inf
        logits[:, self.tokenizer.all_special_ids] = -torch.inf
        if self.settings.temperature == 0:
            ids[where] = logits.argmax(-1).to(ids.device)
            return
        shares = (logits / self.settings.temperature).softmax(-1).cumsum(-1)
        wanted = torch.from_numpy(points).to(shares)[:, None] * shares[:, -1:]
        ids[where] = torch.searchsorted(shares, wanted, right=True).squeeze(-1).to(ids)


def begin_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a text begins with: begin of sequence, else the one that ends the text before it, else None."""
    begin: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin
