"""Prompt and answer as one text: what the tokens with labels say is what the data say, or the row is refused by its number."""

import json
from pathlib import Path

import pytest
from builders.causal import data_of
from builders.tokenizers import (
    MARKS,
    SlowTokenizer,
    bytes_tokenizer,
    llama_tokenizer,
    sentencepiece_tokenizer,
    unigram_tokenizer,
)
from transformers import AutoConfig, ByT5Tokenizer

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, encode
from distill_llm.data.answers import answer_text
from distill_llm.data.kinds.prompts import prompts
from distill_llm.data.loading import read_task

FAST = {
    "llama": llama_tokenizer,
    "llama legacy": lambda: llama_tokenizer(legacy=True),
    "sentencepiece": sentencepiece_tokenizer,
    "unigram": unigram_tokenizer,
    "bytes": bytes_tokenizer,
    "bytes trimmed": lambda: bytes_tokenizer(trim_offsets=True),
}
ALL = {**FAST, "slow": SlowTokenizer, "letters": ByT5Tokenizer}
TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def learnt(tokenizer, **columns):
    """The tokens of the rows' prompts, and those with labels."""
    task = prompts(("messages",)) if "messages" in columns else prompts()
    rows = encode(data_of(task, **columns), tokenizer, 200).train
    names = tokenizer.convert_ids_to_tokens
    found = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        first = labels.count(-100)
        assert labels == [-100] * first + ids[first:]
        found.append((names(ids[:first]), names(ids[first:])))
    return found


@pytest.mark.parametrize("name", ["llama", "llama legacy", "sentencepiece", "unigram"])
def test_an_answer_does_not_begin_with_a_mark_that_the_text_does_not_have(name):
    found = learnt(FAST[name](), prompt=["2+2=", "2+2=", "is a b?"], response=["4", " 4", "yes"])
    equation = ["▁", "2", "+", "2", "="]
    assert [answer for _, answer in found] == [["4", "</s>"], ["▁4", "</s>"], ["yes", "</s>"]]
    assert [prompt for prompt, _ in found][:2] == [equation, equation]


@pytest.mark.parametrize("legacy", [True, False])
def test_nor_does_the_answer_of_a_chat(legacy):
    tokenizer = llama_tokenizer(legacy=legacy, chat_template=TURNS)
    turns = [{"role": "user", "content": "is a"}, {"role": "assistant", "content": "yes"}]
    ((prompt, answer),) = learnt(tokenizer, messages=[turns])
    assert answer == ["yes", "</s>"]
    assert [each for each in prompt if each != "▁"][-2:] == ["<|assistant|>", "<0x0A>"]


PAIRS = [
    ("a bc", "d e"),
    ("a:", " b"),
    ("x\n\n", "yes"),
    ("is it? ", "é \U0001f600 ."),
    ("é", "é"),
    ("a", ""),
    ("", "a b"),
]


@pytest.mark.parametrize("name", ALL)
def test_prompt_and_labels_together_are_the_text_or_the_row_is_refused(name):
    tokenizer = ALL[name]()
    refused = 0
    for prompt, response in [*PAIRS, ("a ", "b"), ("ab", "cd")]:
        try:
            rows = encode(data_of(prompts(), prompt=[prompt], response=[response]), tokenizer, 200).train
        except InputError as error:
            refused += 1
            assert "share the token" in str(error) and (prompt, response) not in PAIRS[:3]
            continue
        ids, labels = rows["input_ids"][0], rows["labels"][0]
        ids, first = ids[:-1], labels.count(-100)
        whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        if prompt:
            assert ids[:first] == tokenizer(prompt, add_special_tokens=False)["input_ids"], "as a model meets it"
            assert tokenizer.decode(ids) == tokenizer.decode(whole)
        assert ids[first:] == whole[len(whole) - len(ids[first:]) :]
    assert refused <= 3


@pytest.mark.parametrize(
    ("name", "prompt", "response", "token"),
    [
        *((name, "2+2= ", "4", "▁4") for name in ("llama", "llama legacy", "sentencepiece", "unigram")),
        ("llama", "ab", "cd", "bc"),
        ("bytes", "a: ", "yes", "Ġyes"),
        ("bytes trimmed", "a: ", "yes", "Ġyes"),
        ("slow", "ab", "cd", "bc"),
    ],
)
def test_a_token_across_the_border_is_refused_with_the_numbers_of_the_rows(name, prompt, response, token):
    many = 1500  # more than are encoded at once
    rows = {"prompt": ["a:"] * many, "response": [" d"] * many}
    for place in (3, 1200):
        rows["prompt"][place], rows["response"][place] = prompt, response
    data, tokenizer = data_of(prompts(), **rows), ALL[name]()
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError) as caught:
            encode(data, tokenizer, 200)
        line = str(caught.value)
        assert line.startswith("data.path: got ") and "\n" not in line and f"share the token '{token}'" in line
        assert "in 2 (numbers 4, 1201, counted from 1) of the rows" in line and "move the space" in line


def test_row_numbers_are_those_of_the_file_after_rows_were_set_apart_and_drawn(tmp_path: Path):
    rows = [{"prompt": "ab" if number == 17 else "a:", "response": "cd"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_task(DataSpec("prompts", str(tmp_path / "rows.jsonl")), AutoConfig.for_model("llama"))
    for refused in (
        lambda: encode(data, llama_tokenizer(), 64),
        lambda: data.task.kind.check_rows(data, llama_tokenizer()),
    ):
        with pytest.raises(InputError, match=r"in 1 \(number 18, counted from 1\) of the rows"):
            refused()


@pytest.mark.parametrize("name", ALL)
def test_an_answer_as_text_continues_its_prompt(name):
    tokenizer = ALL[name]()
    for prompt, response in [("a:", " b"), ("a bc", "d e"), ("2+2=", "4")]:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        assert whole[: len(ids)] == ids and answer_text(tokenizer, whole[len(ids) :], ids) == response
    assert MARKS[0] not in tokenizer.get_vocab() or answer_text(tokenizer, tokenizer.convert_tokens_to_ids(MARKS)) == ""
