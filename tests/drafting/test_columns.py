"""The task and the columns of rows: found where they are clear, asked for where they are not."""

import pytest
from datasets import ClassLabel, Dataset
from transformers import BertConfig, LlamaConfig

from distill_llm.common.errors import InputError
from distill_llm.drafting.columns import task_of
from distill_llm.drafting.model import ModelFacts
from distill_llm.models.finding import OpenModel

TEXTS = [f"the film number {i} is long" for i in range(40)]
MOODS = ["good", "bad"] * 20
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


class Tokenizer:
    """All that is asked of one."""

    chat_template = "{{ messages }}"


def model(task: str | None = None, writes: bool = False, masked: bool = False) -> ModelFacts:
    """A base encoder, unless said otherwise."""
    config = LlamaConfig() if writes else BertConfig()
    opened = OpenModel("model", "m", "m", config, Tokenizer())  # type: ignore[arg-type]
    return ModelFacts(opened, None, task, "the model says so", writes, masked, 1)  # type: ignore[arg-type]


def rows(**columns) -> Dataset:
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("data", "of", "task", "columns"),
    [
        (rows(text=TEXTS, label=[0, 1] * 20), model(), "classification", {"text": "text", "label": "label"}),
        (rows(tweet=TEXTS, mood=["", *MOODS[1:]]), model(), "classification", {"text": "tweet", "label": "mood"}),
        (
            rows(id=range(40), Review=TEXTS, stars=[1, 2, 3, 4] * 10),
            model(),
            "classification",
            {"text": "Review", "label": "stars"},
        ),
        (rows(text=TEXTS, grade=[i / 7 for i in range(40)]), model(), "regression", {"text": "text", "label": "grade"}),
        (rows(text=TEXTS, grade=[1, 2] * 20), model("regression"), "regression", {"text": "text", "label": "grade"}),
        (
            rows(premise=TEXTS, hypothesis=TEXTS[::-1], label=[0, 1] * 20),
            model("classification"),
            "classification",
            {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        ),
        (rows(line=TEXTS), model(masked=True), "text", {"text": "line"}),
        (rows(text=TEXTS), model(writes=True), "text", {"text": "text"}),
        (rows(id=range(40), messages=[CHAT] * 40), model(writes=True), "prompts", {"messages": "messages"}),
        (
            rows(question=TEXTS, answer=TEXTS[::-1]),
            model(writes=True),
            "prompts",
            {"prompt": "question", "response": "answer"},
        ),
    ],
)
def test_what_is_clear_is_found_and_said(data, of, task, columns):
    found = task_of(data, of, None, {})
    assert found.task == task and dict(found.columns) == columns
    assert f"task: {task}" in found.said[0]
    assert found.chat == ("prompt" in columns)


@pytest.mark.parametrize(
    ("data", "of", "given", "option", "named"),
    [
        (rows(text=TEXTS, mood=MOODS, genre=MOODS), model(), {}, "label", ("mood", "genre")),
        (rows(text=TEXTS, score=[0, 1] * 20, class_=MOODS, topic=MOODS), model(), {}, "label", ("score", "topic")),
        (rows(title=TEXTS, plot=TEXTS[::-1], label=[0, 1] * 20), model(), {}, "text", ("title", "plot")),
        (rows(text=TEXTS, id=range(40)), model(), {"label": "id"}, "task", ("40 different values",)),
        (rows(text=TEXTS, label=["good"] * 39 + [""]), model(), {}, "label", ("two different labels", "'good'")),
        (rows(text=TEXTS, label=MOODS), model(writes=True), {}, "task", ("label",)),
        (
            rows(instruction=TEXTS, input=TEXTS, output=TEXTS),
            model(writes=True),
            {},
            "columns",
            ("instruction", "input"),
        ),
        (rows(text=TEXTS, label=MOODS), model(), {"label": "mood"}, "label", ("text, label",)),
    ],
)
def test_what_is_not_clear_is_asked_for_in_one_line(data, of, given, option, named):
    with pytest.raises(InputError) as error:
        task_of(data, of, None, given)
    assert error.value.field == option
    assert all(name in str(error.value) for name in named) and "\n" not in str(error.value)


@pytest.mark.parametrize(("label", "said"), [([1, 2, 3, 4] * 10, True), ([0, 1] * 20, False), (MOODS, False)])
def test_whole_numbers_are_classes_with_a_line_that_says_what_else_they_may_be(label, said):
    found = task_of(rows(text=TEXTS, label=label), model(), None, {})
    assert found.task == "classification" and ("--task regression" in found.said[0]) == said


def test_what_the_user_says_counts():
    data = rows(title=TEXTS, plot=TEXTS[::-1], mood=MOODS, genre=MOODS)
    found = task_of(data, model(), None, {"text": "plot", "label": "genre"})
    assert (found.task, dict(found.columns)) == ("classification", {"text": "plot", "label": "genre"})
    stars = rows(text=TEXTS, stars=[1, 2] * 20)
    assert task_of(stars, model(), "regression", {}).task == "regression"
    assert task_of(rows(text=TEXTS, label=MOODS), model(writes=True), "text", {}).columns == {"text": "text"}


def test_a_label_column_knows_its_classes():
    data = rows(text=TEXTS, kind=[i % 12 for i in range(40)]).cast_column("kind", ClassLabel(12))
    assert task_of(data, model(), None, {}).columns["label"] == "kind"
