"""Answers that student and teacher write together, token by token, both with caches of what was written."""

import inspect
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from distill_llm.responses.sampling import Known, Watching, drawn


class Alongside:
    """A teacher that reads what is being written, one token at a time.

    Args:
        model: in evaluation mode; of the student's tokenizer.
        mask: (B, T) of the prompts, which are padded on the left.
        tokens: how many tokens the tokenizer has.
    """

    def __init__(self, model: PreTrainedModel, mask: torch.Tensor, tokens: int):
        self.model, self.mask, self.known = model, mask, Known(tokens)
        self.cache: Any = None
        self.takes = inspect.signature(model.forward).parameters

    def __call__(self, input_ids: torch.Tensor, width: int) -> torch.Tensor:
        """(B, `width`) logits in fp32 of the token behind `input_ids` (B, T), whose last column is new since the last call."""
        more = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), more)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        new = input_ids if self.cache is None else input_ids[:, -1:]
        given: dict[str, Any] = {"attention_mask": mask, "use_cache": True, "past_key_values": self.cache}
        if "position_ids" in self.takes:
            given["position_ids"] = positions[:, -new.shape[1] :]
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = 1
        outputs = self.model(input_ids=new, **given)
        self.cache = outputs.past_key_values
        logits = self.known(input_ids, outputs.logits[:, -1].float())[:, :width]
        return torch.nn.functional.pad(logits, (0, width - logits.shape[1]), value=-torch.inf)


class Mixed(Watching):
    """Draws from a mixture of both models, and keeps what corrects for it (MiniLLM, Gu et al., 2024).

    With the share a, tokens are drawn from a p + (1 - a) q; the number kept of each is q over this mixture, its importance
    weight for a student that was to draw alone.

    Args:
        teacher: alongside.
        share: of the teacher, above 0 and below 1.
        temperature: above 0; the student's scores are divided by it already.
    """

    def __init__(self, teacher: Alongside, share: float, temperature: float):
        super().__init__()
        self.teacher, self.temperature = teacher, temperature
        self.shares = torch.tensor([1 - share, share]).log().tolist()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, V) of the mixture, from the student's scores."""
        self.taken(input_ids[:, -1])
        own = scores.float().log_softmax(-1)
        given = (self.teacher(input_ids, scores.shape[1]).to(own.device) / self.temperature).log_softmax(-1)
        mixture = torch.logaddexp(own + self.shares[0], given + self.shares[1])
        self._waiting = (own - mixture).exp()
        return mixture


class Replaced(LogitsProcessor):
    """Keeps a token that the student proposes if it is among the teacher's likeliest; else the teacher draws one.

    (Speculative knowledge distillation, Xu et al., 2024.)

    Args:
        teacher: alongside.
        accepted: k, how many of the teacher's likeliest tokens are kept.
        temperature: of the teacher's draw; 0: its likeliest token.
        uniforms: (B, steps) in [0, 1), of the student's proposals; None: its likeliest token.
    """

    def __init__(self, teacher: Alongside, accepted: int, temperature: float, uniforms: torch.Tensor | None):
        self.teacher, self.accepted, self.temperature, self.uniforms = teacher, accepted, temperature, uniforms

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) in which an accepted proposal is certain, and otherwise those of the teacher."""
        given = self.teacher(input_ids, scores.shape[1]).to(scores.device)
        if self.uniforms is None:
            proposal = scores.argmax(-1, keepdim=True)
        else:
            proposal = drawn(scores, self.uniforms[:, input_ids.shape[1] - self.teacher.mask.shape[1]])
        best = given.topk(min(self.accepted, given.shape[1]), dim=-1).indices
        kept = torch.full_like(given, -torch.inf).scatter_(1, proposal, 0.0)
        accepted = (best == proposal).any(-1, keepdim=True)
        return torch.where(accepted, kept, given / (self.temperature or 1.0))
