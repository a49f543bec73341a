"""Augmented rows: which words change and into what, mixtures as models read them, the same draws in every process."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from builders.models import tiny_model
from builders.recipes import faults_at_the_door, recipe_with, write_model, write_rows
from builders.runs import write_learnable_rows
from builders.texts import make_tokenizer
from builders.tokenizers import bytes_tokenizer, sentencepiece_tokenizer
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import BertTokenizer, TrainerCallback

from distill_llm.common.errors import InputError
from distill_llm.data.augmenting import Augment, AugmentingCollator, Mixup, Replace, Spans, Words
from distill_llm.data.augmenting.collator import CANDIDATES
from distill_llm.data.epochs import Epoch
from distill_llm.data.padding import PaddingCollator
from distill_llm.losses.labels import IGNORED
from distill_llm.models.candidates import WordSource
from distill_llm.training.trainer import DistillationConfig, DistillationTrainer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s", "##ly", "un", "plot", ".", "the"]
ALL = Augment(share=0.7, replace=Replace(0.4), backoff=Spans(0.2, 2), cutout=Spans(0.2, 2), mixup=Mixup(0.5))
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def word_pieces() -> BertTokenizer:
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)})


def rows_of(count: int = 16, seed: int = 0) -> Dataset:
    """Rows of 4 to 10 words, a [CLS] and a [SEP], with a class."""
    random = np.random.default_rng(seed)
    ids = [[2, *random.integers(10, 60, random.integers(4, 11)).tolist(), 3] for _ in range(count)]
    candidates = [[(token + shift) % 50 + 10 for token in row[1:-1] for shift in (1, 2, 3)] for row in ids]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], CANDIDATES: candidates}
    return Dataset.from_dict({**columns, "labels": random.integers(0, 2, count).tolist()})


def collator_of(rows: Dataset, settings: Augment, epoch: int = 0, seed: int = 3) -> AugmentingCollator:
    tokenizer = make_tokenizer()
    made = AugmentingCollator(PaddingCollator(tokenizer), rows, tokenizer, settings, seed).at(Epoch())
    made.epoch.number = epoch
    return made


def lines(batch: dict[str, torch.Tensor]) -> list[tuple]:
    """What is in each row of a batch, without padding."""
    names = [name for name in ("input_ids", "attention_mask", "mixed_ids", "mixed_shares") if name in batch]
    shown = []
    whole = [name for name in ("labels", "augmented", "mixed_share", "mixed_labels") if name in batch]
    for row in range(len(batch["input_ids"])):
        there = batch["input_ids"][row] != 0
        ends = [f"{name} {batch[name][row].tolist()}" for name in whole]
        shown.append((*(str(batch[name][row][there].tolist()) for name in names), *ends))
    return shown


@pytest.mark.parametrize(
    "tokenizer, text, words",
    [
        (word_pieces(), "the films. unly plot", ["the", "film ##s", "un ##ly", "plot"]),
        (bytes_tokenizer(), "yes yes,bc", ["yes", "Ġyes", "bc"]),
        (sentencepiece_tokenizer(), "yes 4+a yesbc", ["▁yes", "▁4", "a", "▁yes bc"]),
    ],
)
def test_a_word_is_a_run_of_pieces_between_spaces_or_marks(tokenizer, text, words):
    ids = np.array(tokenizer(text)["input_ids"])
    names = tokenizer.convert_ids_to_tokens(ids)
    starts, ends = Words(tokenizer).spots(ids)
    assert [" ".join(names[start:end]) for start, end in zip(starts, ends, strict=True)] == words


def test_every_batch_process_and_worker_draws_the_same_and_every_epoch_anew():
    rows = rows_of()
    for settings in (ALL, Augment(share=0.7, replace=Replace(), cutout=Spans(0.3))):
        whole = lines(collator_of(rows, settings)([*rows]))
        one_by_one = [lines(collator_of(rows, settings)([row]))[0] for row in rows]
        if settings.mixup is None:  # else the columns of mixtures are in batches that have one
            assert one_by_one == whole
        later = lines(collator_of(rows, settings, epoch=1)([*rows]))
        assert sum(a != b for a, b in zip(whole, later, strict=True)) >= 10
        assert lines(collator_of(rows, settings, seed=4)([*rows])) != whole


def test_outside_of_training_rows_stay_as_they_are():
    rows, tokenizer = rows_of(), make_tokenizer()
    plain = PaddingCollator(tokenizer)
    batch = AugmentingCollator(plain, rows, tokenizer, ALL, seed=3)([*rows])
    expected = plain([{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], each) for name, each in expected.items())


def test_words_give_their_place_to_one_of_their_candidates_at_the_share_that_is_asked_for():
    rows = rows_of(400)
    batch = collator_of(rows, Augment(share=0.5, replace=Replace(0.4)))([*rows])
    changed, words, drawn = 0, 0, Counter()
    for row, ids, counted in zip(rows, batch["input_ids"].tolist(), batch["augmented"].tolist(), strict=True):
        before, after = row["input_ids"], ids[: len(row["input_ids"])]
        own = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert all(b in {(a + shift) % 50 + 10 for shift in (1, 2, 3)} for a, b in own)
        drawn.update((b - a) % 50 for a, b in own)
        assert counted == [int(bool(own)), len(own), len(before)] and after[0] == 2 and after[-1] == 3
        changed, words = changed + len(own), words + len(before) - 2
    assert changed / words == pytest.approx(0.5 * 0.4, abs=0.02)
    assert len(drawn) == 3 and min(drawn.values()) > 0.28 * changed  # all candidates alike


def test_a_run_of_words_backs_off_to_words_as_often_as_rows_have_them():
    words, random = [10] * 30 + [11] * 10, np.random.default_rng(0)
    ids = [[2, *random.permutation(words).tolist(), 3] for _ in range(150)]
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 42] * len(ids)})
    batch = collator_of(rows, Augment(share=1.0, backoff=Spans(0.5, 4)))([*rows])
    counts = Counter(batch["input_ids"][:, 1:-1].flatten().tolist())
    assert counts.keys() == {10, 11} and counts[10] / counts.total() == pytest.approx(0.75, abs=0.02)


def test_a_word_of_several_pieces_becomes_one_token():
    tokenizer = word_pieces()
    row = {"input_ids": [2, 7, 8, 9, 11, 3], "attention_mask": [1] * 6, "token_type_ids": [0] * 6}
    rows = Dataset.from_list([{**row, CANDIDATES: [6, 13]}])
    settings = Augment(1.0, replace=Replace(1.0))
    made = AugmentingCollator(PaddingCollator(tokenizer), rows, tokenizer, settings).at(Epoch())
    batch = made([*rows])
    assert batch["input_ids"].tolist() == [[2, 6, 13, 3]] and batch["token_type_ids"].tolist() == [[0] * 4]
    assert batch["augmented"].tolist() == [[1, 4, 6]]


def test_cut_out_tokens_are_hidden_from_the_models_and_special_ones_are_not():
    rows = rows_of(200)
    batch = collator_of(rows, Augment(share=1.0, cutout=Spans(0.3, 2)))([*rows])
    shares = []
    for row, ids, mask, counted in zip(
        rows, batch["input_ids"], batch["attention_mask"], batch["augmented"], strict=True
    ):
        length = len(row["input_ids"])
        assert (
            ids[:length].tolist() == row["input_ids"] and mask[0] == mask[length - 1] == 1 and not mask[length:].any()
        )
        hidden = length - int(mask.sum())
        assert hidden >= 1 and counted.tolist() == [1, hidden, length]
        shares.append(hidden / (length - 2))
    assert np.mean(shares) == pytest.approx(0.3, abs=0.06)  # runs overlap, and there is always one


def test_labels_are_left_out_where_the_recipe_says_so():
    rows = rows_of(40)
    batch = collator_of(rows, Augment(share=0.5, keep_labels=False, cutout=Spans()))([*rows])
    changed = batch["augmented"][:, 0] == 1
    assert (batch["labels"][changed] == IGNORED).all() and 10 < changed.sum() < 30
    assert batch["labels"][~changed].tolist() == [
        row["labels"] for row, gone in zip(rows, changed, strict=True) if not gone
    ]


def test_both_models_read_a_mixture_of_embeddings_and_learn_both_labels_in_its_shares(tmp_path):
    """Student and teacher, as wide as they are, get inputs_embeds that are added up by hand from the rows themselves."""
    rows = rows_of(6).remove_columns(CANDIDATES)
    settings = Augment(share=0.6, mixup=Mixup(1.0))
    student = tiny_model(hidden=16, vocab=101, layers=1, **NO_DROPOUT)
    teacher = tiny_model(vocab=101, layers=2, seed=1, **NO_DROPOUT)
    tokenizer = make_tokenizer()
    own = DistillationTrainer(
        student,
        teacher,
        args=DistillationConfig(
            str(tmp_path),
            losses={"labels": {}, "logits": {}},
            max_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            per_device_train_batch_size=6,
            learning_rate=0.0,
            logging_steps=1,
        ),
        train_dataset=rows,
        data_collator=AugmentingCollator(PaddingCollator(tokenizer), rows, tokenizer, settings, seed=3),
    )
    own.train()
    batch = collator_of(rows, settings)([*rows])
    mixed = [row for row in range(6) if batch["mixed_share"][row] < 1]
    assert 0 < len(mixed) < 6
    total, divergence = 0.0, 0.0
    for row in range(6):
        share = float(batch["mixed_share"][row])
        first = rows[row]
        partners = [
            each for each in rows if batch["mixed_ids"][row].tolist()[: len(each["input_ids"])] == each["input_ids"]
        ]
        second = partners[0] if share < 1 else first
        outputs = []
        for model in (student, teacher):
            table = model.get_input_embeddings().weight
            sides = [table[torch.tensor(each["input_ids"])] for each in (first, second)]
            length = max(map(len, sides))
            sides = [torch.nn.functional.pad(each, (0, 0, 0, length - len(each))) for each in sides]
            added = share * sides[0] + (1 - share) * sides[1]
            outputs.append(model(inputs_embeds=added[None]).logits[0].log_softmax(-1))
        total += -share * outputs[0][first["labels"]] - (1 - share) * outputs[0][second["labels"]]
        divergence += (outputs[1].exp() * (outputs[1] - outputs[0])).sum()
    log = own.state.log_history[0]
    assert log["loss/labels"] == pytest.approx(float(total) / 6, rel=1e-5)
    assert log["loss/logits"] == pytest.approx(float(divergence) / 6, rel=1e-4)
    assert own.augmented.totals()["rows_changed"] == len(mixed)


def test_nearest_words_and_likeliest_words_are_those_of_brute_force():
    """Angles in float64 for a word of two pieces; for words of one piece a forward for each, with that word masked."""
    tokenizer = word_pieces()
    model = tiny_model(head="masked-lm", vocab=len(PIECES), layers=1, hidden=16)
    vectors = model.get_input_embeddings().weight.detach()
    ids = [2, 7, 8, 12, 5, 11, 3]  # film ##s . good plot
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * 7}])
    source = WordSource(tokenizer, vectors, 3, model, ["test", str(torch.randn(1).item())])
    found = np.array(source.add_to(rows)[0][CANDIDATES]).reshape(3, 3)
    whole = [PIECES.index(word) for word in ("good", "bad", "film", "un", "plot", "the")]
    table = vectors.double().numpy()
    angle = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    mean = (table[7] + table[8]) / 2
    assert found[0].tolist() == sorted(whole, key=lambda token: -angle(table[token], mean))[:3]
    for place, at in ((1, 4), (2, 5)):
        masked = torch.tensor([[*ids[:at], 4, *ids[at + 1 :]]])
        logits = model(input_ids=masked).logits[0, at].tolist()
        assert (
            found[place].tolist()
            == sorted((each for each in whole if each != ids[at]), key=lambda token: -logits[token])[:3]
        )
    alone = WordSource(tokenizer, vectors, 9, None, ["test"]).add_to(rows)[0][CANDIDATES]
    nearest = sorted((each for each in whole if each != 5), key=lambda token: -angle(table[token], table[5]))
    assert alone[9:18] == [*nearest, -1, -1, -1, -1]  # five other words are all there are


def test_the_shards_of_two_processes_have_the_rows_of_one():
    rows = rows_of()
    made = collator_of(rows, Augment(share=0.7, replace=Replace(), backoff=Spans(0.3, 2)))

    def shard(batch_size, processes, index):
        batches = BatchSampler(range(16), batch_size, drop_last=False)
        sampler = BatchSamplerShard(batches, num_processes=processes, process_index=index)
        return [set(lines(batch)) for batch in DataLoader(rows, batch_sampler=sampler, collate_fn=made)]

    assert [one | two for one, two in zip(shard(4, 2, 0), shard(4, 2, 1), strict=True)] == shard(8, 1, 0)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        control.should_save = True


def training(folder, settings=ALL, **changes):
    fixed = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "save_strategy": "no",
    }
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "seed": 5}
    rows, tokenizer = rows_of(), make_tokenizer()
    return DistillationTrainer(
        tiny_model(vocab=101, layers=1, hidden=16, **NO_DROPOUT),
        tiny_model(vocab=101, layers=1, seed=1, **NO_DROPOUT),
        args=DistillationConfig(str(folder), losses={"labels": {}, "logits": {}}, **{**fixed, **quiet, **changes}),
        train_dataset=rows,
        data_collator=AugmentingCollator(PaddingCollator(tokenizer), rows, tokenizer, settings, seed=3),
        processing_class=tokenizer,
    )


def assert_alike(one, other):
    assert one.augmented.totals() == other.augmented.totals()
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_accumulation_workers_and_a_resume_change_nothing(tmp_path, stop):
    """Steps 2 and 3: at the end of an epoch and in the middle of the next one."""
    whole = training(tmp_path)
    whole.train()
    totals = whole.augmented.totals()
    assert totals["rows"] == 48 and 20 < totals["rows_changed"] < 45
    split = training(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, dataloader_num_workers=2)
    split.train()
    assert_alike(whole, split)
    broken = training(tmp_path, save_strategy="steps", save_steps=100)
    broken.add_callback(Stop(stop))
    broken.train()
    resumed = training(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_alike(whole, resumed)


def test_a_teacher_without_signals_of_changed_rows_is_refused(tmp_path):
    from builders.trainers import cached

    rows = rows_of()
    teacher = tiny_model(vocab=101, layers=1, seed=1)
    data = [
        {name: torch.tensor(row[name]) for name in ("input_ids", "attention_mask", "labels")}
        for row in rows.select([0])
    ]
    with pytest.raises(InputError, match="a cache has no signals of changed rows"):
        trainer = training(tmp_path)
        source = cached(tmp_path / "cache", teacher, data)
        DistillationTrainer(
            trainer.model,
            source,
            args=trainer.args,
            train_dataset=rows,
            data_collator=trainer.data_collator,
        )


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"data__augment": {}}, "at least one of replace, backoff, cutout, mixup"),
        ({"data__augment": {"cutout": {"share": 1}}}, "data.augment.cutout.share"),
        (
            {"data__augment": {"mixup": {}}, "distillation__losses": {"logits": {"divergence": "dkd"}}},
            "dkd needs one label",
        ),
        *(
            pytest.param(changes, line, marks=pytest.mark.slow)
            for changes, line in (
                (
                    {"data__augment": {"labels": "leave_out", "cutout": {}}, "distillation__losses": {"labels": {}}},
                    "set it to keep",
                ),
                ({"data__augment": {"cutout": {}}, "distillation": None}, "add a distillation section"),
                (
                    {"data__augment": {"cutout": {}}, "teacher__cache": "cache"},
                    "a cache knows the rows of the data by their content",
                ),
                ({"data__augment": {"replace": {"model": "TEACHER"}}}, "a ...ForMaskedLM model"),
                ({"data__augment": {"replace": {"model": "OTHER"}}}, "a masked LM with the tokenizer of the teacher"),
            )
        ),
    ],
)
def test_the_door_says_what_augmentation_does_not_go_with(tmp_path, changes, line):
    write_model(tmp_path / "teacher")
    write_model(tmp_path / "other", words=PIECES, head="masked-lm")
    write_rows(tmp_path / "rows.csv")
    for replace in (changes["data__augment"].get("replace"),):
        if replace:
            replace["model"] = str(tmp_path / replace["model"].lower())
    try:
        faults = faults_at_the_door(recipe_with(tmp_path, **changes))
    except InputError as error:
        faults = [str(error)]
    assert any(line in fault for fault in faults), faults
    assert all(len(fault) <= 300 for fault in faults)


@pytest.mark.slow
def test_a_recipe_augments_the_student_alone_and_says_how_much(tmp_path):
    from distill_llm import run

    write_model(tmp_path / "teacher")
    write_model(tmp_path / "filler", head="masked-lm", seed=3)
    write_learnable_rows(tmp_path / "rows.csv")
    augment = {"share": 0.5, "replace": {"model": str(tmp_path / "filler"), "candidates": 3}, "cutout": {}, "mixup": {}}
    training = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True}
    recipe = recipe_with(
        tmp_path, data__augment=augment, distillation={"losses": {"labels": {}, "logits": {}}, **training}
    )
    metrics = run(recipe, tmp_path / "out").metrics
    augmented = metrics["augmented"]
    assert augmented["rows"] == 32 and 6 <= augmented["rows_changed"] <= 26
    assert metrics["rounds"][0]["augmented"] == augmented
