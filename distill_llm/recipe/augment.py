"""The section `data.augment`: how training rows are changed for the student."""

from typing import Literal

from pydantic import Field, model_validator

from distill_llm.common.errors import InputError
from distill_llm.recipe.section import Section


class ReplaceSection(Section):
    """Words replaced by likely ones (TinyBERT, Jiao et al., 2020, algorithm 1)."""

    share: float = Field(default=0.4, gt=0, le=1, description="share of a changed row's words that are replaced")
    candidates: int = Field(default=15, ge=1, le=1000, description="number of words that one is drawn from")
    model: str | None = Field(
        default=None,
        min_length=1,
        description="masked LM with the teacher's tokenizer: folder, Hub id or package://PACKAGE/PATH. It proposes words in"
        " the place of words of one piece, and reads each row once for every word, before training. All other words, and all"
        " without it, get those with the nearest embeddings of the teacher",
    )


class BackoffSection(Section):
    """Runs of words replaced by words drawn by their frequency in all rows (Xie et al., 2017)."""

    share: float = Field(default=0.1, gt=0, le=1, description="share of a changed row's words")
    length: int = Field(default=3, ge=1, description="number of words in a run")


class CutoutSection(Section):
    """Runs of tokens that no model may look at (token and span cutoff, Shen et al., 2020)."""

    share: float = Field(default=0.1, gt=0, lt=1, description="share of a changed row's tokens")
    length: int = Field(default=1, ge=1, description="number of tokens in a run")


class MixupSection(Section):
    """Embeddings of two examples mixed (MixKD, Liang et al., 2021), and their labels with them."""

    alpha: float = Field(
        default=0.4, gt=0, allow_inf_nan=False, description="shares are drawn from Beta(alpha, alpha): 1 is even"
    )


class AugmentSection(Section):
    """Rows changed anew in every epoch, for the student alone; what is given is done in this order to each changed row."""

    share: float = Field(default=0.5, gt=0, le=1, description="share of the rows that are changed in an epoch")
    labels: Literal["keep", "leave_out"] = Field(
        default="keep",
        description="labels of changed rows: those of the data (with mixup both, in their shares), or none, so that these rows"
        " are learnt from the teacher alone",
    )
    replace: ReplaceSection | None = Field(default=None, description="words replaced by likely ones")
    backoff: BackoffSection | None = Field(default=None, description="runs of words replaced by frequent ones")
    cutout: CutoutSection | None = Field(default=None, description="runs of tokens hidden")
    mixup: MixupSection | None = Field(default=None, description="embeddings of two examples mixed")

    @model_validator(mode="after")
    def _something_to_do(self) -> "AugmentSection":
        if not (self.replace or self.backoff or self.cutout or self.mixup):
            raise InputError("", {}, "at least one of replace, backoff, cutout, mixup, for example {cutout: {}}")
        return self
