"""Chats in the words of a tokenizer's template: what is refused, in one line, before the work and during it."""

import json
from pathlib import Path

import pytest
from causal_examples import CHAT_TEMPLATE, causal_model, data_of, word_tokenizer
from recipe_inputs import faults_at_the_door

from distill_llm.data import encode
from distill_llm.data.tasks import prompts
from distill_llm.errors import InputError
from distill_llm.recipe import Recipe, parse_recipe

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
OUT_OF_TYPE = "{{ 1 + messages[0]['content'] }}"
REWRITES = "{{ messages | length }}{% if add_generation_prompt %}assistant{% endif %}"


def chat(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"w{i}"} for i, role in enumerate(roles)]


def recipe(folder: Path, rows: list[dict], template: str | None, **data: object) -> Recipe:
    """Tiny teacher and student with a tokenizer of words, over these rows."""
    causal_model().save_pretrained(folder / "teacher")
    word_tokenizer(**{"chat_template": template} if template else {}).save_pretrained(folder / "teacher")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_recipe(
        {
            "teacher": {"model": str(folder / "teacher")},
            "student": {"model": str(folder / "teacher")},
            "data": {"task": "prompts", "path": str(folder / "rows.jsonl"), "max_length": 32, **data},
            "distillation": {"losses": {"logits": {}}, "max_steps": 1},
            "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
            "output_dir": str(folder / "run"),
        }
    )


@pytest.mark.parametrize(
    ("template", "given", "accepted"),
    [
        (NO_SYSTEM, "a chat of system, user", "no system turn"),
        (OUT_OF_TYPE, "a chat of ", "unsupported operand"),
        (REWRITES, "chats in the words of", "a chat template that only adds the answer"),
    ],
)
def test_a_chat_that_a_template_refuses_is_one_line(template: str, given: str, accepted: str, tmp_path: Path) -> None:
    rows = [chat("user", "assistant"), chat("system", "user", "assistant")]
    with pytest.raises(InputError) as caught:
        encode(data_of(prompts(("messages",)), messages=rows), word_tokenizer(chat_template=template), 32)
    (line,) = faults_at_the_door(recipe(tmp_path, [{"messages": row} for row in rows] * 5, template))
    for said in (line, str(caught.value)):
        assert said.startswith(f"data.path: got '{given}") and accepted in said and "\n" not in said
