"""Prompts of uneven lengths, a tiny teacher that ends some of its responses, and what it says when asked alone."""

import json
from pathlib import Path
from typing import Any

import torch
from builders.causal import EOS, causal_model, word_tokenizer, words
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill_llm.responses.folder import Counts
from distill_llm.responses.respond import respond
from distill_llm.responses.settings import ResponseSettings

ENDS = [EOS, *range(20, 30)]
PROMPTS = [words(*range(start, start + length)) for start, length in enumerate((3, 1, 9, 4, 14, 2, 7, 1, 11, 5, 3))]


def teacher(family: str = "llama", **config: Any) -> PreTrainedModel:
    """Its generation config names further ends, so that responses end at different places, and settings that must not count."""
    model = causal_model(family, **config)
    model.generation_config.eos_token_id = ENDS
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, top_k=2)
    return model


def save_teacher(folder: Path, model: PreTrainedModel | None = None, **tokenizer: Any) -> Path:
    """A folder with the teacher and a tokenizer without a padding token."""
    (model or teacher()).save_pretrained(folder)
    word_tokenizer(begins=True, **tokenizer).save_pretrained(folder)
    return folder


def answer(model: Any, prompts: Any, output_dir: Path, **options: Any) -> Counts:
    """What `respond` returns, with the options of settings and call in one mapping."""
    call = {name: options.pop(name) for name in ("tokenizer", "progress") if name in options}
    return respond(model, prompts, output_dir, ResponseSettings(**options), **call)


def write_prompts(file: Path, prompts: list[str] = PROMPTS, column: str = "prompt") -> Path:
    file.write_text("".join(json.dumps({column: prompt}) + "\n" for prompt in prompts))
    return file


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@torch.no_grad()
def alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int], count: int
) -> tuple[str, bool, list[int]]:
    """Text, whether it ended, and tokens of a greedy response: token by token, without batch, padding or cache."""
    new: list[int] = []
    while len(new) < count and (not new or new[-1] not in ENDS):
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    ended = new[-1] in ENDS
    said = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
    return (f" {said}" if said else said), ended, new  # as it follows the last word of the prompt
