"""Answers chosen by their teacher's likelihood, against choices made by hand."""

import json

import pytest
from builders.causal import word_tokenizer
from builders.recipes import causal_recipe, write_decoder
from builders.responses import PROMPTS, answer, rows_of, teacher
from builders.runs import weights
from datasets import Dataset
from transformers import AutoConfig

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, load_task
from distill_llm.data.answer_choice import AnswerChoice, chosen_answers
from distill_llm.recipe.recipe import parse_recipe

ROWS = [  # prompt, answer, log-probability, tokens: means -1, -2, -0.5, -4, -3, -3
    ("p", "a", -4.0, 4),
    ("p", "b", -2.0, 1),
    ("q", "c", -2.0, 4),
    ("p", "d", -8.0, 2),
    ("q", "e", -3.0, 1),
    ("r", "f", -3.0, 1),
]
PAIR = {"prompt": "prompt", "response": "response"}


def data(rows=ROWS):
    columns = zip(("prompt", "response", "logprob", "tokens"), zip(*rows, strict=True), strict=True)
    return Dataset.from_dict({name: list(values) for name, values in columns})


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"top": 1}, "acf"),
        ({"top": 1, "by": "sum"}, "bcf"),
        ({"top": 2}, "abcef"),
        ({"at_least": -2.0}, "abc"),
        ({"at_least": -2.5, "by": "sum"}, "bc"),
        ({"at_least": -2.0, "top": 1}, "ac"),
        ({"at_least": -100.0}, "abcdef"),
    ],
)
def test_the_likeliest_answers_of_each_prompt_are_kept_in_their_order(choice, kept):
    found = chosen_answers(data(), PAIR, AnswerChoice(**choice), "train")
    assert "".join(found["response"]) == kept


def test_of_equal_answers_the_first_is_kept_and_a_chat_asks_what_stands_before_its_answer():
    turns = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": say}] for ask, say in ("pa", "pb", "qc")
    ]
    rows = Dataset.from_dict({"messages": turns, "logprob": [-1.0, -1.0, -9.0], "tokens": [1, 1, 1]})
    found = chosen_answers(rows, {"messages": "messages"}, AnswerChoice(top=1), "train")
    assert [chat[-1]["content"] for chat in found["messages"]] == ["a", "c"]


def test_rows_without_likelihood_and_thresholds_that_keep_nothing_are_refused():
    with pytest.raises(InputError, match=r"^data.answers: .*respond.*no column logprob$"):
        chosen_answers(data().remove_columns("logprob"), PAIR, AnswerChoice(top=1), "train")
    unknown = data([(*row[:2], None, row[3]) for row in ROWS])  # as a served teacher answers
    with pytest.raises(
        InputError, match=r"^data.answers: .*a teacher in memory: no logprob is known of the train rows$"
    ):
        chosen_answers(unknown, PAIR, AnswerChoice(top=1), "train")
    with pytest.raises(InputError, match=r"^data.answers.at_least: got -0.1; accepted: at most -0.5"):
        chosen_answers(data(), PAIR, AnswerChoice(at_least=-0.1), "train")
    given = {"teacher": {"model": "t"}, "student": {"model": "s"}, "distillation": {"losses": {"labels": {}}}}
    with pytest.raises(InputError, match=r"data.answers: .*top, at_least or both"):
        parse_recipe({**given, "data": {"task": "prompts", "answers": {}}})
    with pytest.raises(InputError, match=r"data.answers.top: "):
        parse_recipe({**given, "data": {"task": "prompts", "answers": {"top": 0}}})


@pytest.mark.slow
def test_several_answers_of_a_teacher_are_chosen_by_a_recipe_and_learnt(tmp_path):
    tokenizer = word_tokenizer(begins=True)
    options = {"max_new_tokens": 6, "samples": 4, "keep_truncated": True, "progress": False, "tokenizer": tokenizer}
    answer(teacher(), PROMPTS, tmp_path / "answers", **options)
    rows = rows_of(tmp_path / "answers")
    best = {}
    for row in rows:
        value = row["logprob"] / row["tokens"]
        if row["prompt"] not in best or value > best[row["prompt"]][0]:
            best[row["prompt"]] = value, row["response"]
    assert len(rows) > 2 * len(best)
    spec = DataSpec("prompts", str(tmp_path / "answers"), answers=AnswerChoice(top=1))
    found = load_task(spec, AutoConfig.for_model("llama"))
    kept = [row["response"] for split in (found.train, found.test) for row in split]
    assert sorted(kept) == sorted(response for _, response in best.values())

    write_decoder(tmp_path / "teacher", tokenizer=tokenizer)
    write_decoder(tmp_path / "student", tokenizer=tokenizer, num_hidden_layers=1)
    data = {"task": "prompts", "path": str(tmp_path / "answers"), "max_length": 32, "answers": {"top": 1}}
    losses = {"losses": {"labels": {}}, "max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 4}
    changes = {"data": data, "student__model": str(tmp_path / "student"), "distillation": losses}
    recipe = causal_recipe(tmp_path, "prompts", **changes)
    distill_llm.run(recipe, tmp_path / "chosen")
    other = causal_recipe(tmp_path, "prompts", **{**changes, "data": {**data, "answers": {"top": 2}}})
    distill_llm.run(other, tmp_path / "more")
    one, two = (weights(tmp_path / name / "student") for name in ("chosen", "more"))
    assert any((one[name] != two[name]).any() for name in one)
    assert json.loads((tmp_path / "answers" / "responses.json").read_text())["counts"]["token_logprob"] < 0
