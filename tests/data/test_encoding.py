"""Token ids, their cache, and batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders.models import tiny_model
from builders.texts import make_tokenizer, sentences
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from distill_llm.common.errors import InputError
from distill_llm.data import GLUE, TaskData, collator, encode
from distill_llm.data.epochs import Epoch
from distill_llm.data.kinds.masked_lm import masked_lm


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def pairs() -> TaskData:
    rows = Dataset.from_dict(
        {"sentence1": [words(1), words(1, 2, 3)], "sentence2": [words(4, 5), words(6)], "labels": [1, 0]}
    )
    return TaskData(GLUE["rte"], rows, None, rows)


def texts(*documents: str) -> TaskData:
    rows = Dataset.from_dict({"text": list(documents)})
    return TaskData(masked_lm("text", "text"), rows, None, rows)


def test_pairs_become_ids_labels_and_length() -> None:
    rows = encode(pairs(), make_tokenizer(), 64).train
    assert rows["input_ids"][0] == [2, 6, 3, 9, 10, 3] and rows["length"][:] == [6, 7]
    assert rows["labels"][:] == [1, 0] and "sentence1" not in rows.column_names


def test_long_rows_are_cut_to_max_length() -> None:
    assert encode(pairs(), make_tokenizer(), 5).train["length"][:] == [5, 5]


@pytest.mark.parametrize("max_length", [3, 65])
def test_impossible_max_length_is_refused(max_length: int) -> None:
    with pytest.raises(InputError, match="4 to 64"):
        encode(pairs(), make_tokenizer(), max_length)


def test_second_encoding_is_read_from_the_cache(datasets_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode(pairs(), make_tokenizer(), 8).train
    files = sorted((datasets_cache / "distill_llm").iterdir())
    used = make_tokenizer()
    used(["w1"], truncation=True, max_length=3, padding=True)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *a, **k: pytest.fail("tokenized again"))
    assert encode(pairs(), used, 8).train["input_ids"][:] == first["input_ids"][:]
    assert sorted((datasets_cache / "distill_llm").iterdir()) == files


def test_other_tokenizer_length_or_rows_are_encoded_anew(datasets_cache: Path) -> None:
    data, tokenizer = pairs(), make_tokenizer()
    encode(data, tokenizer, 8)
    encode(data, tokenizer, 7)
    tokenizer.add_tokens(["new"])
    encode(data, tokenizer, 8)
    encode(TaskData(data.task, data.train.select([0]), None, data.train.select([0])), tokenizer, 8)
    assert len(list((datasets_cache / "distill_llm").iterdir())) == 4


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_to_their_longest_row(side: str) -> None:
    tokenizer = make_tokenizer(side)
    rows = list(encode(pairs(), tokenizer, 64).train)
    batch = collator(GLUE["rte"], tokenizer)(rows)
    kept = [
        {name: row[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in row} for row in rows
    ]
    wanted = tokenizer.pad(kept, return_tensors="pt")
    assert batch.keys() == {*wanted.keys(), "labels"} and batch["labels"].tolist() == [1, 0]
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_documents_are_packed_between_special_tokens() -> None:
    data = texts(words(1, 2, 3), words(4, 5) + "<|endoftext|>" + words(6))
    rows = encode(data, make_tokenizer(), 5).train
    assert rows["input_ids"][:] == [[2, 6, 7, 8, 3], [2, 3, 9, 10, 3], [2, 3, 11, 3]]
    assert rows["length"][:] == [5, 5, 4] and "labels" not in rows.column_names


def test_masks_hide_fifteen_percent_in_the_shares_of_bert() -> None:
    tokenizer = make_tokenizer()
    rows = sentences(2000, 50)
    batch = collator(masked_lm("text", "text"), tokenizer, seed=1)(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], original[chosen]) and not chosen[:, [0, -1]].any()
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.005)
    assert (batch["input_ids"][chosen] == 4).float().mean().item() == pytest.approx(0.8, abs=0.02)
    same = (batch["input_ids"][chosen] == original[chosen]).float().mean().item()
    assert same == pytest.approx(0.1, abs=0.02)


def test_the_masks_of_a_row_depend_on_its_tokens_seed_and_epoch_only() -> None:
    rows = [*sentences(4, 30), *sentences(4, 20, seed=1)]
    make: Callable = lambda seed: collator(masked_lm("text", "text"), make_tokenizer(), seed)  # noqa: E731
    masks, other = make(1), make(2)
    whole = masks(rows)
    torch.rand(3)
    for part in ([0, 1], [6, 2, 5], [7]):
        batch = masks([rows[place] for place in part])
        width = batch["labels"].shape[1]
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name], whole[name][part][:, :width]), part
    assert torch.equal(make(1)(rows)["labels"], whole["labels"])
    assert not torch.equal(other(rows)["labels"], whole["labels"])
    epoch = Epoch()
    training = masks.at(epoch)
    assert torch.equal(training(rows)["labels"], whole["labels"])
    epoch.number = 1
    assert not torch.equal(training(rows)["labels"], whole["labels"])
    assert torch.equal(masks(rows)["labels"], whole["labels"]), "masks of evaluation stay"


def test_every_row_predicts_a_token() -> None:
    make = collator(masked_lm("text", "text"), make_tokenizer())
    for word in range(10, 60):
        labels = make([{"input_ids": [2, word, 3], "attention_mask": [1, 1, 1]}])["labels"]
        assert labels.tolist() == [[-100, word, -100]]


def test_trainer_groups_rows_by_length(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    numbers = torch.randint(1, 30, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"sentence": [words(*range(n)) for n in numbers], "labels": [n % 2 for n in numbers]})
    encoded = encode(TaskData(GLUE["sst2"], rows, None, rows), tokenizer, 64).train
    waste = {}
    for strategy in ("random", "group_by_length"):
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, train_sampling_strategy=strategy, report_to=[], use_cpu=True
        )
        model = tiny_model(vocab=101, layers=1)
        trainer = Trainer(
            model,
            args,
            data_collator=collator(GLUE["sst2"], tokenizer),
            train_dataset=encoded,
            processing_class=tokenizer,
        )
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        waste[strategy] = 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
    assert waste["group_by_length"] < 0.1 < 0.3 < waste["random"]


def test_tokenizers_that_cannot_pad_or_mask_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="mask token"):
        collator(masked_lm("text", "text"), tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="padding token"):
        collator(GLUE["sst2"], tokenizer)
