"""What is learnt of the answer in a chat: all that it says, its own white space, and an end only where it ended."""

import json
from pathlib import Path

import pytest
from builders.causal import data_of
from builders.tokenizers import bytes_tokenizer, llama_tokenizer
from transformers import AutoConfig

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, encode
from distill_llm.data.kinds.prompts import prompts
from distill_llm.data.loading import read_task

BEGIN = "{% for m in messages %}<|{{ m['role'] }}|>\n"
ASK = "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = BEGIN + "{{ m['content'] }}\n" + ASK
TRIMMED = BEGIN + "{{ m['content'] | trim }}<|end|>\n" + ASK
ENDED = BEGIN + "{{ m['content'] }}</s>\n" + ASK
# As many a reasoning model's: thoughts of an answer are gone as soon as it stands in a chat.
FORGETS = BEGIN + "{{ m['content'].split('</think>')[-1] }}</s>\n" + ASK
# Only the last answer keeps them, written anew.
KEEPS_LAST = (
    BEGIN
    + "{% if '</think>' in m['content'] %}{% if loop.last %}<think>\n{{ m['content'].split('<think>')[1].split('</think>')"
    "[0].strip() }}\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1].strip() }}{% else %}{{ m['content'] }}"
    "{% endif %}</s>\n" + ASK
)
# The generation prompt opens the thought.
OPENS = BEGIN + "{{ m['content'] }}</s>\n" + ASK.replace("<|assistant|>\n", "<|assistant|>\n<think>")
CALLS = (
    BEGIN
    + "{{ m['content'] }}{% for c in m.tool_calls or [] %}call {{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}</s>\n" + ASK
)


def chat(answer: str, **more) -> list[dict]:
    return [{"role": "user", "content": "a?"}, {"role": "assistant", "content": answer, **more}]


def learnt(template: str, messages: list, **columns) -> list[str]:
    """The text of the tokens with labels, and of special tokens among them, row by row."""
    tokenizer = llama_tokenizer(chat_template=template)
    task = prompts(("messages",))
    rows = encode(data_of(task, messages=messages, **columns), tokenizer, 500).train
    return [tokenizer.decode([label for label in labels if label != -100]) for labels in rows["labels"]]


@pytest.mark.parametrize(
    ("template", "answer", "wanted"),
    [
        (PLAIN, "yes", "yes</s>"),
        (PLAIN, "yes\n", "yes\n</s>"),
        (PLAIN, "yes  \n\n", "yes  \n\n</s>"),
        (ENDED, "yes \n", "yes \n</s>"),
        (TRIMMED, "yes\n", "yes<|end|></s>"),
        (TRIMMED, "e", "e<|end|></s>"),
        (PLAIN, "", "</s>"),
    ],
)
def test_the_white_space_of_an_answer_is_its_own_and_that_of_the_template_is_not(template, answer, wanted):
    assert learnt(template, [chat(answer)]) == [wanted]


@pytest.mark.parametrize(
    ("template", "answer", "wanted"),
    [
        (PLAIN, "yes\n", "yes\n"),
        (TRIMMED, "e", "e"),
        (ENDED, "an e", "an e"),
        (KEEPS_LAST, "<think>a</think>b", "<think>\na\n</think>\n\nb"),
    ],
)
def test_an_answer_that_was_cut_has_no_end(template, answer, wanted):
    found = learnt(template, [chat(answer)] * 4, finish_reason=["length", "stop", "eos", None])
    assert found[0] == wanted
    assert all(each.startswith(wanted) and each.endswith("</s>") for each in found[1:])


def test_neither_has_a_response_without_a_chat(tmp_path: Path):
    reasons = ["length", "stop", "eos", None] * 5
    rows = [{"prompt": f"a{i}:", "response": " b", "finish_reason": reason} for i, reason in enumerate(reasons)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = llama_tokenizer()
    data = read_task(DataSpec("prompts", str(file)), AutoConfig.for_model("llama"))
    encoded = encode(data, tokenizer, 64)
    ends = [
        (text, labels[-1] == tokenizer.eos_token_id)
        for raw, made in ((data.train, encoded.train), (data.test, encoded.test))
        for text, labels in zip(raw["prompt"], made["labels"], strict=True)
    ]
    assert sorted(ends) == sorted((row["prompt"], row["finish_reason"] != "length") for row in rows)
    rows[6]["finish_reason"] = "max_tokens"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = r"the finish_reason 'max_tokens' in 1 \(number 7, counted from 1\) of the train rows.*; write length where"
    with pytest.raises(InputError, match=line):
        read_task(DataSpec("prompts", str(file)), AutoConfig.for_model("llama"))


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (KEEPS_LAST, "<think>a b</think>c"),
        (PLAIN, "<think>\na\n</think>\nb"),
        (OPENS, "<think>a</think>b"),
        (FORGETS, "no thought"),
    ],
)
def test_thoughts_that_the_template_keeps_are_learnt(template, answer):
    (found,) = learnt(template, [chat(answer)])
    said = answer.removeprefix("<think>") if template == OPENS else answer
    assert "".join(found.split()) == "".join(said.split()) + "</s>"


@pytest.mark.parametrize(
    ("template", "turn", "dropped"),
    [
        (FORGETS, {"answer": "<think>a</think>b"}, "<think>a</think>b"),
        (PLAIN, {"answer": "b", "reasoning_content": "so it is"}, "so it is"),
        (ENDED, {"answer": "b", "thinking": "so it is"}, "so it is"),
        (ENDED, {"answer": "so it is: 4", "reasoning": "4"}, "4"),
        (ENDED, {"answer": "look", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "x"}}}]}, "look"),
        (ENDED, {"answer": "b", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "x y"}}}]}, "look"),
        (ENDED.replace("m['content']", "m['content'][:3]"), {"answer": "yes it is"}, "yes it is"),
    ],
)
def test_a_row_of_which_the_template_drops_a_part_is_refused_by_its_number(template, turn, dropped):
    rows = [chat("yes"), chat(**turn), chat("no"), chat(**turn)]
    if len(turn) > 1:
        rows = [[each[0], {**dict.fromkeys(rows[1][1]), **each[1]}] for each in rows]  # as `datasets` reads them
    with pytest.raises(InputError) as caught:
        learnt(template, rows)
    line = str(caught.value)
    assert line.startswith("data.path: got ") and "the chat template leaves out" in line and repr(dropped)[1:-1] in line
    assert "in 2 (numbers 2, 4, counted from 1) of the rows" in line and "\n" not in line


def test_calls_of_tools_that_the_template_writes_are_learnt():
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": 'x "y"'}}}
    (found,) = learnt(CALLS, [chat("so:", tool_calls=[call])])
    assert found == 'so:call look {"at": "x \\"y\\""}</s>'


def test_an_answer_whose_white_space_joins_that_of_the_template_is_refused_with_what_to_do():
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(InputError) as caught:
        encode(data_of(prompts(("messages",)), messages=[chat("yes"), chat("\n\nyes")]), tokenizer, 500)
    line = str(caught.value)
    assert "an answer that shares the token 'ĊĊ' with the words of the chat template" in line and "(number 2, " in line
    assert line.endswith("remove the white space with which the answer begins")
