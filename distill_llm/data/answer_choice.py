"""Which of several answers to a prompt are learnt: those that the teacher itself finds likely."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.common.notices import tell

LOGPROB, TOKENS = "logprob", "tokens"
"""Columns of generated answers: the sum of the log-probabilities of their tokens under the teacher, and their number."""
FIELD = "data.answers"


@dataclass(frozen=True)
class AnswerChoice:
    """How answers are chosen.

    Attributes:
        top: how many of each prompt's answers, the likeliest; None: any number.
        at_least: the smallest log-probability, in nats; None: any.
        by: the mean over the answer's tokens, or their sum, which is larger for short answers.
    """

    top: int | None = None
    at_least: float | None = None
    by: Literal["mean", "sum"] = "mean"


def chosen_answers(rows: Dataset, names: Mapping[str, str], choice: AnswerChoice, split: str) -> Dataset:
    """The rows whose answers are chosen, in the order that they have. Of equal answers the first is the likelier.

    Args:
        rows: with the columns of `distill-llm respond`.
        names: of the columns of text, by our name for them.
        split: what messages call the rows.

    Raises:
        InputError: the rows do not say how likely their answers are, or none is likely enough.
    """
    missing = [name for name in (LOGPROB, TOKENS) if name not in rows.column_names]
    if missing:
        fix = f"leave it out, or answer the prompts with `distill-llm respond`: the {split} rows have no column {missing[0]}"
        raise InputError(FIELD, _given(choice), fix=fix)
    if not any(total is not None and tokens for total, tokens in zip(rows[LOGPROB][:], rows[TOKENS][:], strict=True)):
        fix = f"leave it out, or answer the prompts with a teacher in memory: no {LOGPROB} is known of the {split} rows"
        raise InputError(FIELD, _given(choice), fix=fix)
    asked = [_prompt(content, names) for content in rows[_asking(names)][:]]
    values = [_value(*each, choice.by) for each in zip(rows[LOGPROB][:], rows[TOKENS][:], strict=True)]
    by_prompt: dict[str, list[int]] = {}
    for place, prompt in enumerate(asked):
        if choice.at_least is None or values[place] >= choice.at_least:
            by_prompt.setdefault(prompt, []).append(place)
    kept = sorted(
        place
        for places in by_prompt.values()
        for place in sorted(places, key=lambda place: (-values[place], place))[: choice.top]
    )
    if not kept:
        best = max(values, default=float("-inf"))
        raise InputError(f"{FIELD}.at_least", choice.at_least, f"at most {best:.4g}, of the likeliest answer ({split})")
    tell(
        f"{FIELD}: kept {len(kept):,} of {len(rows):,} answers ({split}), to {len(by_prompt):,} of {len({*asked}):,} prompts"
    )
    return rows.select(kept)


def _given(choice: AnswerChoice) -> dict[str, Any]:
    return {name: value for name, value in vars(choice).items() if value is not None}


def _asking(names: Mapping[str, str]) -> str:
    return names.get("messages") or names["prompt"]


def _prompt(content: Any, names: Mapping[str, str]) -> str:
    """What a row asks, as a key: a text, or the turns of a chat before its answer."""
    return json.dumps(content[:-1] if "messages" in names else content, sort_keys=True)


def _value(total: float | None, tokens: int | None, by: str) -> float:
    if total is None or not tokens:
        return float("-inf")
    return total / tokens if by == "mean" else total
