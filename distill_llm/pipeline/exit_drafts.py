"""How well the exits of a language model say the next token, and how fast it writes with their drafts."""

from math import isfinite
from typing import Any

from transformers import PreTrainedModel

from distill_llm.data.causal import prompt_length
from distill_llm.evaluation.language_exits import token_scores
from distill_llm.measuring.drafting import drafting, fastest
from distill_llm.models.limits import limits_of
from distill_llm.pipeline.context import Context

TEXTS, PROMPT, NEW = 8, 32, 64
"""Texts that are written; tokens of a prompt that is cut out of a text; most new tokens of each."""
LIMIT = 60.0
"""Seconds for all writing together, about; two texts are always written, where there are as many: one has no standard error."""


def draft_record(run: Context, student: PreTrainedModel) -> dict[str, Any]:
    """What is known of a language model's exits, and the one to draft with (see `fastest`)."""
    *early, whole = token_scores(student, run.data.test, run.collator, run.recipe.evaluation.batch_size)
    prompts, new = _prompts(run, student)
    once = drafting(student, prompts[:1], new, early[0].layers)
    prompts = prompts[: max(2, int(LIMIT / (len(early) * (once.plain + once.seconds))))]
    exits, drafts, written, seconds = [], {}, 0, 0.0
    for score in early:
        made = drafts[score.layers] = drafting(student, prompts, new, score.layers)
        written, seconds = written + made.written, seconds + made.plain
        exits.append(
            {
                **vars(score),
                "accepted": made.accepted,
                "tokens_per_run": made.tokens,
                "tokens_per_second": made.written / made.seconds,
                "speedup": made.speedup,
                "speedup_error": made.error if isfinite(made.error) else None,
                "same": made.same,
            }
        )
    return {
        "after": [score.layers for score in early],
        "layers": whole.layers,
        "draft": fastest(drafts),
        "exits": exits,
        "whole": {**vars(whole), "tokens_per_second": written / seconds},
        "texts": len(prompts),
        "new_tokens": new,
    }


def _prompts(run: Context, student: PreTrainedModel) -> tuple[list[list[int]], int]:
    """Beginnings of test rows, evenly spread over them, and how many tokens to write after each."""
    rows, longest = run.data.test, limits_of(student.config, type(student).__name__).longest
    found = []
    for row in rows.select(range(0, len(rows), -(-len(rows) // TEXTS))):
        ids, length = row["input_ids"], prompt_length(row["labels"])
        cut = length if length > 1 else min(PROMPT, len(ids) // 2)
        found.append(ids[: max(1, cut if longest is None else min(cut, longest // 2))])
    most = max(map(len, found))
    return found, NEW if longest is None else min(NEW, longest - most)
