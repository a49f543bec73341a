"""Answers that a student gives while it learns: the section `responses` of an objective."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill_llm.common.errors import InputError
from distill_llm.common.validation import faults_of
from distill_llm.losses.terms.term import Use


class Responses(BaseModel):
    """On-policy distillation (GKD, Agarwal et al., 2024, algorithm 1): the student itself answers a share of the batches.

    Prompts are those of the batch; the terms compare student and teacher on the student's answers. Terms that compare with
    the labels of the data, as `labels` does, count rows of the data only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(default=0.5, gt=0, le=1, description="Share of the batches that the student answers.")
    max_new_tokens: int = Field(default=128, ge=1, description="Largest number of tokens in an answer.")
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="Divides the logits; 0 is greedy.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Draw from the likeliest tokens that together have this probability; 1: from all.",
    )
    top_k: int = Field(default=0, ge=0, description="Draw from the k likeliest tokens; 0: from all.")
    beside: bool = Field(
        default=False,
        description="Put the answers beside the rows of the data, which stay in the batch, in place of replacing them.",
    )
    by: Literal["student", "mixed", "speculative"] = Field(
        default="student",
        description="Who writes: the student; mixed: tokens are drawn from a mixture of student and teacher; speculative:"
        " the student proposes tokens, and the teacher replaces those that it finds unlikely.",
    )
    teacher_share: float | None = Field(
        default=None, gt=0, lt=1, description="Of mixed: the teacher's share of the mixture; left out: 0.2."
    )
    clip: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Of mixed: the largest importance weight; left out: 2."
    )
    accepted: int | None = Field(
        default=None,
        ge=1,
        description="Of speculative: a token stays if it is among the teacher's so many likeliest; left out: 25.",
    )

    @model_validator(mode="after")
    def _settings_belong(self) -> "Responses":
        for name, owner in (("teacher_share", "mixed"), ("clip", "mixed"), ("accepted", "speculative")):
            if getattr(self, name) is not None and self.by != owner:
                raise InputError(name, getattr(self, name), fix=f"leave it out, or set by to {owner}")
        if self.by == "mixed" and (self.temperature == 0 or self.top_p < 1 or self.top_k):
            name = "temperature" if self.temperature == 0 else "top_p" if self.top_p < 1 else "top_k"
            fix = "leave it out: importance weights are of the whole mixture, which tokens are drawn from"
            raise InputError(name, getattr(self, name), fix=fix)
        return self

    def faults(self, use: Use) -> Iterator[InputError]:
        """What answers of the student do not go with."""
        if use.kind not in (None, "next_token"):
            yield InputError("", "a student that does not generate", "a causal language model")
        if use.teacher is not None and not use.teacher.new_text:
            yield InputError("", use.teacher.name, "a teacher in memory: this one cannot judge the student's answers")
        if self.by != "student" and use.teacher is not None and not use.teacher.writes:
            yield InputError("by", self.by, f"student: {use.teacher.name} cannot write token by token with the student")
        if use.packed:
            yield InputError("", f"rows of several sequences ({use.packed})", "one prompt in each row")
        if use.sharding not in (None, "FSDP2"):
            yield InputError("", f"a student sharded by {use.sharding}", "FSDP2 (fsdp_version 2), or DDP")


def sampling_faults(max_new_tokens: Any, temperature: Any, top_p: Any, top_k: Any) -> list[InputError]:
    """Values out of the ranges of `Responses`, which hold for whoever draws responses."""
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    try:
        Responses.model_validate(given, strict=True)
    except ValidationError as error:
        return faults_of(error, Responses)
    return []
