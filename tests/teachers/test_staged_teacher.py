"""A teacher whose weights change by the student's step."""

import copy
import json

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, causal_model, rows, trainer_of
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.teachers import StagedTeacher

pytestmark = pytest.mark.slow
RATE = 0.5
SGD = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"}
LOSSES = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}


def stacked(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def saved(folder, make, seeds):
    """Models with other weights, and where they are saved."""
    models = [make(layers=3, seed=seed) for seed in seeds]
    for seed, model in zip(seeds, models, strict=True):
        model.save_pretrained(folder / str(seed))
    return models, [folder / str(seed) for seed in seeds]


def plain(**given):
    return tiny_model(**NO_DROPOUT, **given)


@pytest.mark.parametrize(
    "starts, taught", [({1: 0, 3: 1}, (None, 0, 0, 1)), ({0: 0, 0.5: 1}, (0, 0, 1, 1)), ({0.25: 1}, (None, 1, 1, 1))]
)
def test_four_steps_are_those_of_a_loop_by_hand(tmp_path, starts, taught):
    (first, *later), (_, *folders) = saved(tmp_path, plain, (5, 6, 7))
    student = plain(layers=2)
    data = rows(student)
    own, batch, apart = copy.deepcopy(student).train(), stacked(data), []
    labels = batch.pop("labels")
    for place in taught:
        with torch.no_grad():
            target = (first if place is None else later[place])(**batch).logits.softmax(-1)
        logits = own(**batch).logits
        apart.append(F.kl_div(logits.log_softmax(-1), target, reduction="batchmean"))
        (0.5 * F.cross_entropy(logits, labels) + 0.5 * apart[-1]).backward()
        with torch.no_grad():
            for weight in own.parameters():
                if weight.grad is not None:
                    weight -= RATE * weight.grad
                    weight.grad = None
    teacher = StagedTeacher(copy.deepcopy(first), {start: folders[place] for start, place in starts.items()})
    trainer = trainer_of(tmp_path, student, teacher, data, LOSSES, max_steps=4, **SGD)
    trainer.train()
    logged = [log["loss/logits"] for log in trainer.state.log_history if "loss/logits" in log]
    assert logged == pytest.approx([value.item() for value in apart], rel=1e-3)
    for (name, weight), other in zip(student.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_training_reads_the_weights_of_its_step_and_ends_with_the_same_bits(tmp_path):
    (first, *_), (_, *folders) = saved(tmp_path, causal_model, (5, 6, 7))
    start = causal_model(layers=2)
    data = rows(start, count=16)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": True}
    losses = {**LOSSES, "hidden": {"layers": "uniform"}}

    def trained(later, resume=None):
        student, teacher = copy.deepcopy(start), StagedTeacher(copy.deepcopy(first), later)
        trainer_of(tmp_path, student, teacher, data, losses, **settings).train(resume_from_checkpoint=resume)
        assert teacher.model.dtype == torch.bfloat16
        return list(student.state_dict().values())

    def same(left, right):
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    later = {1: folders[0], 3: folders[1]}
    whole = trained(later)
    assert same(whole, trained(later, str(tmp_path / "checkpoint-2")))
    assert not same(whole, trained({3: folders[1]}, str(tmp_path / "checkpoint-2")))


OWN = """
from transformers import BertConfig, BertForSequenceClassification


class OwnConfig(BertConfig):
    model_type = "own_bert"


class OwnBert(BertForSequenceClassification):
    config_class = OwnConfig
"""


def test_checkpoints_with_code_of_their_own_are_read_where_that_is_trusted(tmp_path):
    """As those of a teacher with code of its own are, which the run saves at its stages."""
    (first, later), (_, folder) = saved(tmp_path, plain, (5, 6))
    (folder / "own.py").write_text(OWN)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnBert"}
    config |= {"model_type": "own_bert", "architectures": ["OwnBert"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    batch = {name: each for name, each in stacked(rows(first)).items() if name != "labels"}
    with pytest.raises(InputError, match="contains custom code"):
        StagedTeacher(copy.deepcopy(first), {1: folder}).signals(batch, 1)
    teacher = StagedTeacher(copy.deepcopy(first), {1: folder}, trust_remote_code=True)
    assert torch.equal(teacher.signals(batch, 0).logits, first(**batch).logits)
    assert torch.equal(teacher.signals(batch, 1).logits, later(**batch).logits)


def test_what_cannot_teach_in_stages_is_refused_in_one_line(tmp_path):
    (first, _), (_, folder) = saved(tmp_path, plain, (5, 6))
    for start in (-1, 1.0, 1.5, "2", True):
        with pytest.raises(InputError, match="^later: got .*accepted: a whole number of steps, or a share"):
            StagedTeacher(first, {start: folder})
    with pytest.raises(InputError, match="^later: got 'no checkpoints'"):
        StagedTeacher(first, {})
    student = plain(layers=2)
    trainer = trainer_of(
        tmp_path, student, StagedTeacher(first, {0: folder, 0.1: folder}), rows(student), LOSSES, max_steps=2
    )
    with pytest.raises(InputError, match="^teacher.checkpoints: .*two begin at the same step"):
        trainer.train()
    plain(layers=4).save_pretrained(tmp_path / "deeper")
    trainer = trainer_of(
        tmp_path, student, StagedTeacher(first, {1: tmp_path / "deeper"}), rows(student), LOSSES, max_steps=2
    )
    with pytest.raises(
        InputError, match="^teacher.checkpoints: got '.*deeper, where .*layer.3.*weights of the teacher's own"
    ):
        trainer.train()
