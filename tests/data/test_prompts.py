"""Prompts with responses: columns, labels, what is left out, chats, and rows that sequences share."""

import json
import logging
from pathlib import Path

import pytest
import torch
from builders.causal import BOS, CHAT_TEMPLATE, EOS, causal_model, data_of, ids, word_tokenizer, words
from datasets import Dataset
from transformers import AutoConfig

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, collator, encode
from distill_llm.data.decoders import PACKED_FAMILIES
from distill_llm.data.kinds.prompts import prompts
from distill_llm.data.loading import read_task
from distill_llm.models.inputs import forward_inputs

LLAMA = AutoConfig.for_model("llama")
CHATS = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4 w5"},
    ],
]


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_columns_are_taken_by_name_and_only_responses_have_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"q": words(1, 2), "a": words(i), "extra": i} for i in range(20)])
    data = read_task(DataSpec("prompts", file, columns={"prompt": "q", "response": "a"}), LLAMA)
    assert data.task == prompts() and data.train.column_names == ["prompt", "response"]
    rows = encode(data, word_tokenizer(), 16).train
    assert sorted(rows["input_ids"][:]) == sorted([*ids(1, 2), *ids(i), EOS] for i in _numbers(data.train))
    assert sorted(rows["labels"][:]) == sorted([-100, -100, *ids(i), EOS] for i in _numbers(data.train))


def _numbers(rows: Dataset) -> list[int]:
    return [int(text[1:]) for text in rows["response"]]


def test_bos_begins_a_prompt_and_an_empty_one_begins_with_eos() -> None:
    data = data_of(prompts(), prompt=[words(1), ""], response=[words(2), words(3)])
    assert encode(data, word_tokenizer(begins=True), 8).train["input_ids"][:] == [
        [BOS, *ids(1, 2), EOS],
        [BOS, *ids(3), EOS],
    ]
    rows = encode(data, word_tokenizer(), 8).train
    assert rows["input_ids"][1] == [EOS, *ids(3), EOS] and rows["labels"][1] == [-100, *ids(3), EOS]


def test_responses_are_cut_and_rows_without_room_left_out_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(prompts(), prompt=[words(1, 2, 3), words(1, 2, 3, 4), words(*range(9))], response=[words(4, 5)] * 3)
    with caplog.at_level(logging.WARNING):
        rows = encode(data, word_tokenizer(), 4).train
    assert rows["input_ids"][:] == [ids(1, 2, 3, 4)] and rows["labels"][:] == [[-100] * 3 + ids(4)]
    assert [record.getMessage() for record in caplog.records] == [
        "left out 2 of 3 rows, whose prompts have 4 tokens or more"
    ] * 2


def test_rows_left_out_may_fill_a_whole_chunk_and_not_all() -> None:
    long, short = words(*range(9)), words(1)
    rows = {"prompt": [long] * 1000 + [short], "response": [short] * 1001}
    assert len(encode(data_of(prompts(), **rows), word_tokenizer(), 8).train) == 1
    with pytest.raises(InputError, match=r"data\.max_length: got 8"):
        encode(data_of(prompts(), prompt=[long], response=[short]), word_tokenizer(), 8)


@pytest.mark.parametrize("named", [False, True])
def test_chats_are_prompts_in_the_words_of_the_template(named: bool, tmp_path: Path) -> None:
    column = "talk" if named else "messages"
    file = write(tmp_path / "a.jsonl", [{column: CHATS[i % 2]} for i in range(20)])
    data = read_task(DataSpec("prompts", file, columns={"messages": "talk"} if named else None), LLAMA)
    assert data.task.text_columns == ("messages",)
    tokenizer = word_tokenizer(begins=True)
    with pytest.raises(InputError, match="chat template"):
        encode(data, tokenizer, 32)
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = encode(data_of(data.task, messages=CHATS), tokenizer, 32).train
    user, assistant = 94, 95
    first = [user, *ids(1, 2), EOS, assistant], [*ids(3), EOS]
    second = [user, *ids(1), EOS, assistant, *ids(2), EOS, user, *ids(3), EOS, assistant], [*ids(4, 5), EOS]
    assert rows["input_ids"][:] == [p + r for p, r in (first, second)]
    assert rows["labels"][:] == [[-100] * len(p) + r for p, r in (first, second)]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "data.columns.messages"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
            "data.columns.messages",
        ),
        ({"messages": "x"}, "data.columns.messages"),
        ({"prompt": "x"}, "data.columns.response"),
        ({"prompt": "x", "response": 1}, "data.columns.response"),
        ({"text": "x"}, "data.columns.prompt"),
    ],
)
def test_rows_that_are_no_prompts_are_refused_in_one_line(row: dict, field: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [row] * 4)
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("prompts", file), LLAMA)
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_encoders_and_families_that_mix_packed_rows_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "x", "response": "y"}] * 4)
    with pytest.raises(
        InputError, match=r"data\.task: got 'prompts'; choose text, .* bert models cannot answer prompts"
    ):
        read_task(DataSpec("prompts", file), AutoConfig.for_model("bert"))
    assert read_task(DataSpec("prompts", file), AutoConfig.for_model("opt")).task.packing is False
    with pytest.raises(InputError, match=r"data\.packing: got True; leave packing out: opt mixes"):
        read_task(DataSpec("prompts", file, packing=True), AutoConfig.for_model("opt"))
    with pytest.raises(InputError, match=r"evaluation\.metric: got 'accuracy'"):
        read_task(DataSpec("prompts", file, metric="accuracy"), LLAMA)


def test_packing_puts_whole_training_sequences_into_full_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (60, 2), generator=draw).tolist()
    columns = {
        "prompt": [words(*range(p)) for p, _ in sizes],
        "response": [words(*range(20, 20 + r)) for _, r in sizes],
    }
    task = prompts(packing=True)
    plain = encode(data_of(prompts(), **columns), word_tokenizer(), 32)
    packed = encode(data_of(task, **columns), word_tokenizer(), 32)
    assert packed.test["input_ids"][:] == plain.test["input_ids"][:] and "position_ids" not in packed.test.column_names
    wanted = sorted(zip(plain.train["input_ids"], plain.train["labels"], strict=True))
    found = []
    for row in packed.train:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], row["length"]], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start)) and row["labels"][start] == -100
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
        assert len(row["input_ids"]) == len(row["attention_mask"]) == row["length"] <= 32
    assert sorted(found) == wanted
    assert sum(packed.train["length"]) > 0.9 * 32 * len(packed.train) and len(packed.train) < len(plain.train) / 2


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_logits_of_a_packed_batch_are_those_of_its_parts(family: str) -> None:
    model = causal_model(family, num_local_experts=2, sliding_window=4)
    columns = {
        "prompt": [words(*range(n)) for n in (7, 5, 6, 2)],
        "response": [words(40, 41), words(50), words(60), ""],
    }
    plain = encode(data_of(prompts(), **columns), word_tokenizer(), 18).train
    packed = encode(data_of(prompts(packing=True), **columns), word_tokenizer(), 18).train
    batch = collator(prompts(packing=True), word_tokenizer())(list(packed))
    assert batch["input_ids"].shape[0] == 2 and batch["attention_mask"].sum() < batch["attention_mask"].numel()
    with torch.no_grad():
        logits = model(**forward_inputs(model, batch)).logits
        for row in plain:
            alone = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            matches = [
                logits[r, s : s + len(alone)]
                for r in range(2)
                for s in range(18)
                if batch["input_ids"][r, s : s + len(alone)].tolist() == row["input_ids"]
                and batch["position_ids"][r, s] == 0
            ]
            assert len(matches) == 1
            torch.testing.assert_close(matches[0], alone, atol=1e-4, rtol=1e-4)
        if family == "llama":  # with the mask, sequences would see one another
            leaking = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
            assert (leaking - logits).abs().max() > 0.1
