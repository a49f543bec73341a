"""How a pass over calibration data runs and what it collects: one object, from a recipe or a caller to the place that uses it."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of every pass over calibration data; each pass reads those that concern it.

    Attributes:
        moments: collect the second moments that compensation of heads and neurons needs.
        moment_share: the share of the tokens with a gradient that second moments are of, drawn at random and weighted by its
            inverse. None: all tokens until there are half as many as channels, then one in four. 1 takes about half a
            forward pass more.
        hidden: collect statistics of the residual stream's channels.
        hidden_moments: collect the second moments that compensation of its channels needs: for each tensor that a norm of
            the stream gives out or linears read, as many fp32 numbers as channels squared.
        weight_gradients: collect gradients with respect to the layers' weights, summed over examples: about half a backward pass
            more, and as many fp32 numbers as weights.
        exact: keep the backward products in the model's precision. Otherwise those of fp32 linears run in bf16 where the
            device is faster at it; ranks hardly move (see `fast_backward`).
        precision: run the forward pass, and so the backward pass, under autocast in this dtype. Sums are in fp32.
        checkpointing: hold the activations of one layer at a time, for models of which all do not fit. The layers' forward
            runs twice: about one more forward pass in time. Without a loss nothing is held anyway.
        seed: of the labels drawn for loss "kl", and of the tokens drawn for second moments.
        sharded: on several processes, each takes its part of the batches (all give the same batches in the same order) and
            their sums are added up: every process ends with what one alone would find, up to rounding.
        device: compute there with the weights of one layer at a time, while the model stays where it is: for models that do
            not fit there whole. With a loss it needs `checkpointing`. None: where the model is.

    Raises:
        InputError: a share that is not above 0 and at most 1.
    """

    moments: bool = True
    moment_share: float | None = None
    hidden: bool = True
    hidden_moments: bool = False
    weight_gradients: bool = False
    exact: bool = False
    precision: torch.dtype | None = None
    checkpointing: bool = False
    seed: int = 0
    sharded: bool = False
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.moment_share is not None and not 0 < self.moment_share <= 1:
            raise InputError("moment_share", self.moment_share, "above 0 and at most 1")

    def device_for(self, model: PreTrainedModel) -> torch.device:
        """Where the model computes."""
        return model.device if self.device is None else torch.device(self.device)


DEFAULT_SETTINGS = CalibrationSettings()
