"""Prompts as chats in the words of a tokenizer's template: their tokens, in training and generation, and what is refused."""

import json
import re
from datetime import date
from pathlib import Path

import pytest
import torch
from builders.causal import (
    CHAT_TEMPLATE,
    EOS,
    THINKING_TEMPLATE,
    causal_model,
    data_of,
    ids,
    word_tokenizer,
)
from builders.recipes import faults_at_the_door
from typer.testing import CliRunner

import distill_llm
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, collator, encode
from distill_llm.data.kinds.prompts import prompts
from distill_llm.data.loading import read_task
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.evaluation.generation import respond
from distill_llm.losses.objective import Responses
from distill_llm.pipeline.folder import RunFolder
from distill_llm.recipe.recipe import Recipe, parse_recipe
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.training.on_policy import StudentResponses

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
    ("template", "given", "numbers"),
    [
        (NO_SYSTEM, "a chat that the chat template refuses ('no system turn')", {2}),
        (OUT_OF_TYPE, 'a chat that the chat template refuses ("unsupported operand', {1, 2}),
        (REWRITES, "a chat whose question the chat template writes otherwise before the answer 'w", {1, 2}),
    ],
)
def test_a_chat_that_a_template_refuses_is_one_line_with_its_number(
    template: str, given: str, numbers: set[int], tmp_path: Path
) -> None:
    rows = [chat("user", "assistant"), chat("system", "user", "assistant")]
    with pytest.raises(InputError) as caught:
        encode(data_of(prompts(("messages",)), messages=rows), word_tokenizer(chat_template=template), 32)
    (line,) = faults_at_the_door(recipe(tmp_path, [{"messages": row} for row in rows] * 5, template))
    for said in (line, str(caught.value)):
        assert said.startswith("data.path: got ") and given in said.replace("\\", "") and "\n" not in said
    shown = re.search(r"\(numbers? ([\d, ]+), counted from 1\)", str(caught.value))
    assert {int(number) for number in shown[1].split(",")} == numbers


QUESTIONS = [{"q": f"w{i} w{i + 1}", "a": f"w{i + 30}"} for i in range(20)]
NAMED = {"columns": {"prompt": "q", "response": "a"}, "chat": True}
OFF = {"enable_thinking": False}


@pytest.mark.parametrize("kwargs", [None, OFF])
def test_prompts_of_plain_text_become_chats_with_labels_at_the_answer(kwargs: dict | None, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    data = read_task(DataSpec("prompts", str(file), **NAMED, chat_template_kwargs=kwargs))
    rows = encode(data, word_tokenizer(begins=True, chat_template=THINKING_TEMPLATE), 32)
    user, assistant, thought = 94, 95, ids(80, 81)
    found = [(row["input_ids"], row["labels"]) for split in (rows.train, rows.test) for row in split]
    wanted = []
    for i in range(20):
        prompt = [user, *ids(i, i + 1), EOS, assistant, *(thought if kwargs else [])]
        response = [*([] if kwargs else thought), *ids(i + 30), EOS]
        wanted.append((prompt + response, [-100] * len(prompt) + response))
    assert sorted(found) == sorted(wanted)


def test_models_answer_behind_the_generation_prompt_of_the_template_when_scored_and_on_policy(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    data = read_task(DataSpec("prompts", str(file), **NAMED, chat_template_kwargs=OFF))
    tokenizer, model = word_tokenizer(chat_template=THINKING_TEMPLATE), causal_model()
    rows, pad = encode(data, tokenizer, 32), collator(data.task, tokenizer)

    def alone(question: str) -> list[int]:
        turns = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **OFF)["input_ids"]

    def answer(asked: list[int]) -> list[int]:
        made = list(asked)
        while len(made) < len(asked) + 4 and (len(made) == len(asked) or made[-1] != EOS):
            made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
        return made

    asked = [alone(chat[0]["content"]) for chat in data.test["messages"]]
    with torch.no_grad():
        wanted = [answer(each) for each in asked]
    texts, given = respond(model, rows.test, pad, 4, progress=False)
    text = [tokenizer.decode(w[len(a) :], skip_special_tokens=True) for w, a in zip(wanted, asked, strict=True)]
    assert texts == text and given == [chat[1]["content"] for chat in data.test["messages"]]
    settings = Responses(temperature=0, max_new_tokens=4)
    made = StudentResponses(settings, pad, 0)(model, pad([dict(row) for row in rows.test]), 0)
    assert [
        row[mask.bool()].tolist() for row, mask in zip(made["input_ids"], made["attention_mask"], strict=True)
    ] == wanted


@pytest.mark.parametrize(
    ("template", "data", "line"),
    [
        (None, NAMED, "accepted: a model whose tokenizer has a chat template, for messages"),
        (
            THINKING_TEMPLATE,
            {**NAMED, "chat_template_kwargs": {"enable_thinkng": False}},
            "data.chat_template_kwargs: got 'enable_thinkng'; accepted: names that the chat template reads,"
            " such as 'enable_thinking' (the nearest)",
        ),
        (
            THINKING_TEMPLATE,
            {**NAMED, "chat_template_kwargs": {"add_generation_prompt": False}},
            "data.chat_template_kwargs: got 'add_generation_prompt'",
        ),
        (
            THINKING_TEMPLATE,
            {"columns": NAMED["columns"], "chat_template_kwargs": OFF},
            "data.chat_template_kwargs: got {'enable_thinking': False}; leave it out, or set `chat`",
        ),
        (THINKING_TEMPLATE, {"task": "text", "columns": {"text": "q"}, "chat": True}, "data.chat: got True"),
        (
            THINKING_TEMPLATE,
            {"task": "text", "columns": {"text": "q"}, "chat_template_kwargs": OFF},
            "data.chat_template_kwargs: got {'enable_thinking': False}",
        ),
    ],
)
def test_chats_that_cannot_be_made_are_one_line_at_the_door(
    template: str | None, data: dict, line: str, tmp_path: Path
) -> None:
    assert faults_at_the_door(recipe(tmp_path, QUESTIONS, THINKING_TEMPLATE, **NAMED)) == []
    (said,) = faults_at_the_door(recipe(tmp_path / "other", QUESTIONS, template, **data))
    assert line in said and "\n" not in said


def test_a_date_is_no_value_for_a_template() -> None:
    with pytest.raises(InputError, match=r"^data\.chat_template_kwargs") as caught:
        data = {
            "task": "prompts",
            "path": "a",
            "chat_template_kwargs": {"date_string": date(2024, 7, 26)},
        }
        parse_recipe({"teacher": {"model": "a"}, "student": {"model": "b"}, "data": data})
    assert "\n" not in str(caught.value)


def test_a_run_or_a_cache_of_another_template_is_not_gone_on_with(tmp_path: Path) -> None:
    from distill_llm.pipeline.caching import cache_recipe

    cached = recipe(tmp_path, QUESTIONS, THINKING_TEMPLATE, **NAMED, chat_template_kwargs=OFF)
    cached.teacher.cache = tmp_path / "cache"
    cache_recipe(cached, CacheSettings(k=4))
    assert faults_at_the_door(cached) == []
    RunFolder(tmp_path / "run", cached.to_yaml())
    other = recipe(tmp_path, QUESTIONS, THINKING_TEMPLATE, **NAMED)
    other.teacher.cache = tmp_path / "cache"
    with pytest.raises(InputError, match="changed since this run was begun: data.chat_template_kwargs"):
        RunFolder(tmp_path / "run", other.to_yaml())
    with pytest.raises(InputError, match=r"teacher\.cache.*another data"):
        distill_llm.run(other, tmp_path / "other")


def test_the_command_line_scores_prompts_as_chats(tmp_path: Path) -> None:
    file, folder, scores = tmp_path / "a.jsonl", tmp_path / "model", tmp_path / "scores.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    tokenizer, model = word_tokenizer(chat_template=THINKING_TEMPLATE), causal_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ["evaluate", str(folder), "--task", "prompts", "--data", str(file), "--columns", "prompt=q,response=a"]
    command += ["--max-length", "32", "--output", str(scores)]
    given = ["--chat", "--chat-template-kwargs", "{enable_thinking: false}"]
    result = CliRunner().invoke(app, command + given)
    assert result.exit_code == 0, result.output
    data = read_task(DataSpec("prompts", str(file), **NAMED, chat_template_kwargs=OFF), training=False)
    rows = encode(data, tokenizer, 32)
    wanted = evaluate_model(model, rows.test, data.task, collator(data.task, tokenizer), batch_size=64)
    assert json.loads(scores.read_text())["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    (line,) = CliRunner().invoke(app, command + given[1:]).stderr.splitlines()
    assert line.startswith("error: --chat-template-kwargs: got ")
