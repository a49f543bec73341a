"""Prompts from files and lists, encoded as training encodes them."""

import json
from pathlib import Path

import pandas
import pytest
from builders.causal import BOS, CHAT_TEMPLATE, EOS, ids, word_tokenizer, words
from builders.responses import write_prompts

from distill_llm.common.errors import InputError
from distill_llm.responses.prompts import encode_prompts, read_contents

USER = {"role": "user", "content": "w1 w2"}
ANSWER = {"role": "assistant", "content": "w3"}


def test_files_of_every_kind_and_lists_give_the_same_prompts(tmp_path: Path) -> None:
    texts = [words(1), words(2, 3), words(1)]
    frame = pandas.DataFrame({"prompt": texts, "other": [1, 2, 3]})
    frame.to_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    write_prompts(tmp_path / "folder" / "train.jsonl", texts)
    for source in (texts, *(str(tmp_path / name) for name in ("a.csv", "a.parquet", "folder"))):
        assert read_contents(source, None, None) == texts
    assert read_contents(str(write_prompts(tmp_path / "b.jsonl", texts, "question")), "question", 2) == texts[:2]


def test_the_answer_of_a_chat_is_left_out_and_nothing_else(tmp_path: Path) -> None:
    system = {"role": "system", "content": "w9", "name": None}
    chats = [[USER, ANSWER], [system, USER], [USER, ANSWER, USER, ANSWER]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    asked = [[USER], [{"role": "system", "content": "w9"}, USER], [USER, ANSWER, USER]]
    assert read_contents(str(tmp_path / "a.jsonl"), None, None) == asked
    assert read_contents(chats, None, None) == asked


def test_repeated_prompts_are_one_and_get_the_tokens_of_training() -> None:
    tokenizer = word_tokenizer(begins=True)
    prompts = encode_prompts([words(1), words(2, 3), words(1)], tokenizer)
    assert [prompt.ids for prompt in prompts] == [[BOS, *ids(1)], [BOS, *ids(2, 3)]]
    tokenizer.chat_template = CHAT_TEMPLATE
    user, assistant = 94, 95
    wanted = [user, *ids(1, 2), EOS, assistant]
    by_flag, given = encode_prompts(["w1 w2"], tokenizer, chat=True), encode_prompts([[USER]], tokenizer)
    assert by_flag == given and given[0].ids == wanted


@pytest.mark.parametrize(
    ("source", "column", "field", "words"),
    [
        (["w1"], "promt", "prompt_column", "'prompt' (the nearest)"),
        (["w1", " "], None, "data", "row 1"),
        ([], None, "data", "no rows"),
        ([[USER], [ANSWER]], None, "prompt_column", "row 1"),
        ([[{"role": "user", "content": ""}]], None, "data", "row 0"),
        ("nowhere/at/all", None, "data", "existing file"),
    ],
)
def test_bad_prompts_are_one_line(source, column, field, words) -> None:
    with pytest.raises(InputError) as caught:
        read_contents(source, column, None)
    assert caught.value.field == field and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_refuses_a_chat_is_one_line_and_one_that_rewrites_answers_may_ask() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(InputError, match="no system turn"):
        encode_prompts([[USER]], tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{% if add_generation_prompt %}assistant{% endif %}"
    (prompt,) = encode_prompts([[USER]], tokenizer)
    assert prompt.ids, "what is generated is trained on as it is, not in the words of the template"
