"""Causal language modelling: which models it is for, its rows and its batches."""

import json
from pathlib import Path

import pytest
import torch
from builders.causal import BOS, EOS, PAD, data_of, ids, word_tokenizer, words
from transformers import AutoConfig

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, collator, encode
from distill_llm.data.decoders import is_decoder
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.data.loading import read_task

TASK = causal_lm("text", "text")


@pytest.mark.parametrize(
    ("family", "architectures", "decoder"),
    [
        ("llama", None, True),
        ("llama", ["PrunedLlamaForCausalLM"], True),
        ("llama", ["LlamaForSequenceClassification"], True),
        ("qwen2", ["Qwen2Model"], True),
        ("gpt2", ["GPT2LMHeadModel"], True),
        ("bert", None, False),
        ("bert", ["BertForMaskedLM"], False),
        ("bert", ["BertLMHeadModel"], True),
        ("modernbert", ["ModernBertForMaskedLM"], False),
        ("xlm", ["XLMWithLMHeadModel"], False),
        ("t5", ["T5ForConditionalGeneration"], False),
        ("bart", ["BartForCausalLM"], False),
    ],
)
def test_decoders_are_told_by_class_then_family(family: str, architectures: list[str] | None, decoder: bool) -> None:
    config = AutoConfig.for_model(family)
    config.architectures = architectures
    assert is_decoder(config) is decoder


def test_text_is_causal_for_a_decoder_and_masked_for_others(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(words(n) for n in range(20)))
    kinds = {
        family: read_task(DataSpec("text", str(file)), config).task.kind.name
        for family, config in [
            ("llama", AutoConfig.for_model("llama")),
            ("bert", AutoConfig.for_model("bert")),
            ("", None),
        ]
    }
    assert kinds == {"llama": "causal_lm", "bert": "masked_lm", "": "masked_lm"}


def test_documents_are_ended_and_cut_into_rows_with_their_tokens_as_labels() -> None:
    data = data_of(TASK, text=[words(1, 2, 3), words(4, 5) + "<|endoftext|>" + words(6, 7)])
    rows = encode(data, word_tokenizer(), 4).train
    stream = [*ids(1, 2, 3), EOS, *ids(4, 5), EOS, *ids(6, 7), EOS]
    assert rows["input_ids"][:] == rows["labels"][:] == [stream[:4], stream[4:8], stream[8:]]
    assert rows["length"][:] == [4, 4, 2] and rows["attention_mask"][:] == [[1] * 4, [1] * 4, [1] * 2]


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_are_lines_are_one_document(causal: bool, tmp_path: Path) -> None:
    lines = ["", f" = {words(1)} = \n", "", words(2, 3), words(4)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines, words(5)]))
    config = AutoConfig.for_model("llama" if causal else "bert")
    tokenizer = word_tokenizer(begins=True, pad=True, mask_token="w89")
    rows = encode(read_task(DataSpec("text", str(file), join_rows=True), config), tokenizer, 32)
    text = tokenizer("\n\n".join(lines))["input_ids"]
    assert rows.train["input_ids"][:] == [[*text, EOS] if causal else text], "in their order, the last tenth apart"
    last = tokenizer(words(5))["input_ids"]
    assert rows.test["input_ids"][:] == [[*last, EOS] if causal else last]


def test_lines_are_joined_before_any_are_drawn(tmp_path: Path) -> None:
    for split, count in (("train", 2500), ("test", 1)):
        lines = (json.dumps({"text": f"line {i}"}) + "\n" for i in range(count))
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    data = read_task(DataSpec("text", str(tmp_path), join_rows=True, train_examples=1, holdout_examples=2))
    for document in (*data.train["text"], *data.validation["text"]):
        numbers = [int(line.split()[1]) for line in document.split("\n\n")]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) in (500, 1000)


def test_only_text_is_joined(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"data\.join_rows: got True; leave it out: prompts does not use it \(only text\)"
    ):
        read_task(DataSpec("prompts", str(tmp_path), join_rows=True))


def test_where_the_tokenizer_begins_texts_so_do_documents_and_rows() -> None:
    rows = encode(data_of(TASK, text=[words(1, 2), words(3, 4)]), word_tokenizer(begins=True), 4).train
    assert rows["input_ids"][:] == [[BOS, *ids(1, 2), EOS], [BOS, BOS, *ids(3, 4)], [BOS, EOS]]


def test_a_document_ends_with_bos_where_there_is_no_eos_and_needs_one_of_them() -> None:
    data = data_of(TASK, text=[words(1, 2)])
    assert encode(data, word_tokenizer(eos_token=None), 8).train["input_ids"][0] == [*ids(1, 2), BOS]
    with pytest.raises(InputError, match="EOS or BOS"):
        encode(data, word_tokenizer(eos_token=None, bos_token=None), 8)


def test_a_last_row_that_predicts_nothing_is_left_out() -> None:
    rows = encode(data_of(TASK, text=[words(1, 2, 3, 4)]), word_tokenizer(), 4).train
    assert rows["input_ids"][:] == [ids(1, 2, 3, 4)]


@pytest.mark.parametrize("pad", [False, True])
def test_batches_are_padded_on_the_right_by_length_not_by_token(pad: bool) -> None:
    tokenizer = word_tokenizer(pad=pad, begins=True)
    tokenizer.padding_side = "left"
    before = (tokenizer.pad_token_id, str(tokenizer.init_kwargs), tokenizer.backend_tokenizer.to_str())
    rows = [{"input_ids": [5, EOS, 6, EOS], "attention_mask": [1] * 4, "labels": [5, EOS, 6, EOS], "length": 4}]
    rows += [{"input_ids": [7, EOS], "attention_mask": [1] * 2, "labels": [7, EOS], "length": 2}]
    batch = collator(TASK, tokenizer)(rows)
    filler = PAD if pad else EOS
    assert batch["input_ids"].tolist() == [[5, EOS, 6, EOS], [7, EOS, filler, filler]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[5, EOS, 6, EOS], [7, EOS, -100, -100]]
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(values.dtype == torch.int64 for values in batch.values())
    assert (tokenizer.pad_token_id, str(tokenizer.init_kwargs), tokenizer.backend_tokenizer.to_str()) == before


def test_settings_of_prompts_are_refused_for_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.packing: got True"):
        read_task(DataSpec("text", str(tmp_path), packing=True))
    with pytest.raises(InputError, match=r"evaluation\.metric: got 'exact_match'"):
        read_task(DataSpec("sst2", str(tmp_path), metric="exact_match"))
