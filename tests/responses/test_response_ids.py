"""Generated answers are learnt as the tokens that were generated; their text is for people, and for other tokenizers."""

import json
import logging
from pathlib import Path

import pytest
import torch
from builders.causal import causal_model
from builders.responses import answer, rows_of
from builders.tokenizers import bytes_tokenizer, llama_tokenizer
from transformers import AutoConfig

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, encode, load_task

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
TOKENIZER = llama_tokenizer(chat_template=TURNS)
PROMPTS = ["a b", "is it?", "2+2=", "a", "b", "c"]
THOUGHT = ["▁a", "</think>", "▁yes", "<|end|>"]
CUT = ["b", "c", "<think>", "▁", "a"]
ENDED = ["▁yes", "▁", "</s>"]


def teacher(*answers: list[str]):
    """Says these pieces, one after the other answer, whatever it is asked; its generation config names a second end."""
    ends = [TOKENIZER.convert_tokens_to_ids(token) for token in ("</s>", "<|end|>")]
    model = causal_model(vocab_size=400)
    model.generation_config.eos_token_id = ends
    left = [TOKENIZER.convert_tokens_to_ids(each) for each in answers]

    def generate(input_ids, **inputs):
        new = [left.pop(0) for _ in input_ids]
        width = max(map(len, new))
        filled = torch.tensor([each + [TOKENIZER.eos_token_id] * (width - len(each)) for each in new])
        return torch.cat([input_ids, filled], dim=1)

    model.generate = generate
    return model


def folder_of(folder: Path, chat: bool) -> Path:
    said = [THOUGHT, ENDED, CUT] * 2
    options = {"batch_size": 1, "max_new_tokens": 5, "temperature": 0, "keep_truncated": True, "chat": chat}
    answer(teacher(*said), PROMPTS, folder, tokenizer=TOKENIZER, progress=False, **options)
    return folder


def data_of_folder(folder: Path):
    return load_task(DataSpec("prompts", str(folder)), AutoConfig.for_model("llama"))


def learnt(data, tokenizer=TOKENIZER) -> dict[str, tuple[list[str], list[str]]]:
    """By prompt or question, the pieces without and with labels."""
    encoded, found = encode(data, tokenizer, 64), {}
    for raw, rows in ((data.train, encoded.train), (data.test, encoded.test)):
        asked = raw["prompt"][:] if "prompt" in raw.column_names else [turns[0]["content"] for turns in raw["messages"]]
        for prompt, ids, labels in zip(asked, rows["input_ids"], rows["labels"], strict=True):
            pieces, first = tokenizer.convert_ids_to_tokens(ids), labels.count(-100)
            assert labels[first:] == ids[first:]
            found[prompt] = pieces[:first], pieces[first:]
    return found


@pytest.mark.parametrize("chat", [False, True])
def test_marks_ends_and_cuts_are_learnt_as_they_were_generated(tmp_path: Path, chat: bool) -> None:
    found = learnt(data_of_folder(folder_of(tmp_path / "out", chat)))
    # The longest prompts are answered first: each answer is of the row that says so.
    by_prompt = {row["messages"][0]["content"] if chat else row["prompt"]: row for row in rows_of(tmp_path / "out")}
    assert {*by_prompt} == {*PROMPTS} == {*found}
    for prompt, row in by_prompt.items():
        asked = TOKENIZER.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        alone = asked["input_ids"] if chat else TOKENIZER(prompt)["input_ids"]
        new = TOKENIZER.convert_ids_to_tokens(row["response_ids"])
        assert new in (THOUGHT, CUT, ENDED) and (row["finish_reason"] == "length") == (new == CUT)
        assert found[prompt] == (TOKENIZER.convert_ids_to_tokens(alone), new)
    texts = {
        tuple(row["response_ids"]): row["messages"][1]["content"] if chat else row["response"]
        for row in by_prompt.values()
    }
    begin = "" if chat else " "
    assert {*texts.values()} == {begin + "a yes", begin + "yes ", "bc a"}, "for people: without marks"


def test_an_edited_text_is_not_silently_left_out(tmp_path: Path) -> None:
    file, rows = tmp_path / "rows.jsonl", rows_of(folder_of(tmp_path / "out", chat=False))
    place = next(place for place, row in enumerate(rows) if row["finish_reason"] == "eos")
    prompt, rows[place]["response"] = rows[place]["prompt"], " no"

    def write() -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    line = rf"a response that is not the text of its response_ids \(' no'\) in 1 \(number {place + 1}, counted from 1\)"
    with pytest.raises(InputError, match=line):
        encode(data_of_folder(file), TOKENIZER, 64)
    rows[place]["response_ids"] = None
    write()
    assert learnt(data_of_folder(file))[prompt][1] == ["▁", "n", "o", "</s>"]
    assert learnt(data_of_folder(file))[rows[place - 1]["prompt"]][1] in (THOUGHT, CUT, ENDED)


def test_another_tokenizer_learns_the_texts_and_the_user_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_of_folder(folder_of(tmp_path / "out", chat=False))
    other = bytes_tokenizer()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data.task.kind.check_rows(data, TOKENIZER)
        assert not caplog.records
        data.task.kind.check_rows(data, other)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "the responses were generated with another tokenizer: they are trained on as texts"
    )
    answers = {tuple(answer) for _, answer in learnt(data, other).values()}
    assert answers == {("Ġ", "a", "Ġyes", "</s>"), ("Ġyes", "Ġ", "</s>"), ("bc", "Ġ", "a")}, (
        "cut ones still without an end"
    )


def test_rows_without_ids_are_learnt_as_texts_and_a_folder_of_the_old_format_is_not_gone_on_with(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path / "out", chat=False)
    rows = [
        {"prompt": p, "response": " yes", "finish_reason": "eos", "tokens": 2, "sample": 0, "seed": 0} for p in PROMPTS
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {tuple(answer) for _, answer in learnt(data_of_folder(folder)).values()} == {("▁yes", "</s>")}
    about = json.loads((folder / "responses.json").read_text())
    del about["format"]
    (folder / "responses.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="^output_dir: got .*without response_ids.*; choose another folder, or remove"):
        folder_of(folder, chat=False)
