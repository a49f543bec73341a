"""Which words are masked while a model trains: the same however batches are split, others in every epoch."""

from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from builders.models import tiny_model
from builders.texts import make_tokenizer, sentences
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback

from distill_llm.data import collator
from distill_llm.data.kinds.masked_lm import masked_lm
from distill_llm.training.trainer import DistillationConfig, DistillationTrainer

ROWS = [row for length in (6, 9, 12, 15) for row in sentences(4, length, seed=length)]
STEPS = 2  # of an epoch of 16 rows in global batches of 8


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        control.should_save = True


def trainer(folder, **settings):
    """A trainer that notes the masked rows of every step in `seen`."""
    fixed = {
        "max_steps": 3 * STEPS,
        "learning_rate": 0.1,
        "optim": "sgd",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    sizes = {"per_device_train_batch_size": 8, "save_strategy": "no", "logging_strategy": "no"}
    own = DistillationTrainer(
        tiny_model(head="masked-lm", vocab=101, layers=1, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
        args=DistillationConfig(str(folder), losses={"labels": {}}, **{**fixed, **sizes, **settings}),
        train_dataset=[{name: values for name, values in row.items() if name != "length"} for row in ROWS],
        eval_dataset=[{name: values for name, values in row.items() if name != "length"} for row in ROWS[::-1]],
        data_collator=collator(masked_lm("text", "text"), make_tokenizer(), seed=3),
    )
    loss, own.seen = own.loss, {}

    def noting(model, batch, *rest):
        own.seen.setdefault(own.state.global_step, set()).update(masks_of(batch))
        return loss(model, batch, *rest)

    noting.of_labels, noting.of_labels_alone = loss.of_labels, loss.of_labels_alone
    own.loss = noting
    return own


def masks_of(batch):
    """(words of the row, what the model reads, places that are predicted) of each row, without padding."""
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
        predicted = labels != -100
        rows = (torch.where(predicted, labels, ids), ids, predicted)
        yield tuple(tuple(each[mask].tolist()) for each in rows)


def by_row(seen):
    """Row -> its masks, epoch by epoch."""
    found = {}
    for step in sorted(seen):
        for row, *masks in seen[step]:
            found.setdefault(row, []).append(masks)
    return found


def test_accumulation_and_workers_change_no_mask_and_every_epoch_has_others(tmp_path):
    whole = trainer(tmp_path)
    whole.train()
    rows = by_row(whole.seen)
    assert len(rows) == 16 and all(len(masks) == 3 for masks in rows.values())
    changed = [first != second for masks in rows.values() for first, second in pairwise(masks)]
    assert sum(changed) >= 0.9 * len(changed)
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for settings in (half, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, **half}):
        other = trainer(tmp_path, **settings)
        other.train()
        assert other.seen == whole.seen
        for name, tensor in whole.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_resumed_training_has_the_masks_of_an_unbroken_one(tmp_path):
    whole = trainer(tmp_path)
    whole.train()
    for stop in (STEPS, STEPS + 1):
        broken = trainer(tmp_path / str(stop), save_strategy="steps", save_steps=100)
        broken.add_callback(Stop(stop))
        broken.train()
        resumed = trainer(tmp_path / str(stop))
        resumed.train(resume_from_checkpoint=str(tmp_path / str(stop) / f"checkpoint-{stop}"))
        assert broken.seen | resumed.seen == whole.seen and not broken.seen.keys() & resumed.seen.keys()


def test_the_shards_of_two_processes_have_the_masks_of_one(tmp_path):
    masks = collator(masked_lm("text", "text"), make_tokenizer(), seed=3)

    def shard(batch_size, processes, index):
        batches = BatchSampler(range(16), batch_size, drop_last=False)
        sampler = BatchSamplerShard(batches, num_processes=processes, process_index=index)
        return [set(masks_of(batch)) for batch in DataLoader(ROWS, batch_sampler=sampler, collate_fn=masks)]

    pairs = zip(shard(4, 2, 0), shard(4, 2, 1), strict=True)
    assert [one | two for one, two in pairs] == shard(8, 1, 0)


def test_masks_of_evaluation_stay_the_same_while_those_of_training_change(tmp_path):
    own = trainer(tmp_path, eval_strategy="epoch", learning_rate=0.0, dataloader_num_workers=1)
    own.train()
    losses = [log["eval_loss"] for log in own.state.log_history if "eval_loss" in log]
    assert len(losses) == 3 and len(set(losses)) == 1
