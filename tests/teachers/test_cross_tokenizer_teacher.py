"""A teacher with a tokenizer of its own in a training: against the plain loss, and however batches are divided."""

import copy

import pytest
import torch
from builders.pairs import assert_alike, one_and_two_processes
from builders.retokenized import TERM, TEXTS, model_for, rows_of
from builders.tokenizers import bytes_tokenizer, llama_tokenizer, sentencepiece_tokenizer
from builders.trainers import step_gradient, trainer_of
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from distill_llm.common.errors import InputError
from distill_llm.data.causal import CausalCollator, sequence_packer
from distill_llm.teachers import CrossTokenizerTeacher

pytestmark = pytest.mark.slow


def step(folder, student, teacher, tokenizer, losses=TERM, rows=None, **settings):
    rows = rows_of(tokenizer) if rows is None else rows
    collator = CausalCollator(tokenizer)
    options = {"processing_class": tokenizer, "data_collator": collator, **settings}
    return step_gradient(folder, student, teacher, rows, losses, **options)


def assert_same(found, expected, name="loss", other="loss", atol=1e-6):
    (gradients, log), (wanted, wanted_log) = found, expected
    assert log[name] == pytest.approx(wanted_log[other], rel=1e-5)
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=atol, msg=parameter)


def with_other_ids(tokenizer):
    """The same tokenizer with its tokens in another order, and that order: the old id of each new one."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    count = len(names) - len(state["added_tokens"])  # added tokens come last: the library numbers them itself
    order = [*torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist(), *range(count, len(names))]
    new = {names[old]: number for number, old in enumerate(order)}
    state["model"]["vocab"] = {name: new[name] for name in state["model"]["vocab"]}
    for token in state["added_tokens"]:
        token["id"] = new[token["content"]]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    extra = {"additional_special_tokens": [t for t in ("<|user|>", "<|end|>") if t in new]}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special, **extra)
    return made, order


def reordered(model, order):
    """The model with the rows of its vocabulary in another order."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.copy_(module.weight[order].clone())
    return model


def test_one_tokenizer_for_both_gives_the_loss_of_logits(tmp_path):
    tokenizer = llama_tokenizer()
    student, teacher = model_for(tokenizer), model_for(tokenizer, seed=1)
    expected = step(tmp_path, student, teacher, tokenizer, {"logits": {"temperature": 2.0}})
    found = step(tmp_path, student, CrossTokenizerTeacher(teacher, llama_tokenizer()), tokenizer)
    assert_same(found, expected, "loss/cross_tokenizer", "loss/logits")


def test_one_tokenizer_with_other_ids_gives_the_loss_of_logits(tmp_path):
    tokenizer = bytes_tokenizer()
    other, order = with_other_ids(tokenizer)
    student, teacher = model_for(tokenizer), model_for(tokenizer, seed=1)
    expected = step(tmp_path, student, teacher, tokenizer, {"logits": {"temperature": 2.0}})
    turned = CrossTokenizerTeacher(reordered(teacher, order), other)
    found = step(tmp_path, student, turned, tokenizer)
    assert not turned.aligner.alike
    assert_same(found, expected, "loss/cross_tokenizer", "loss/logits")


@pytest.mark.parametrize("tokenizers", [(llama_tokenizer, bytes_tokenizer), (bytes_tokenizer, sentencepiece_tokenizer)])
def test_a_step_does_not_depend_on_how_its_batch_is_divided_or_padded(tmp_path, tokenizers):
    own, other = (make() for make in tokenizers)
    student = model_for(own)
    teacher = model_for(other, seed=1, spare=3)
    whole = step(tmp_path, student, CrossTokenizerTeacher(teacher, other), own)
    parts = step(
        tmp_path,
        student,
        CrossTokenizerTeacher(teacher, other),
        own,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert_same(parts, whole)
    worker = step(tmp_path, student, CrossTokenizerTeacher(teacher, other), own, dataloader_num_workers=1)
    assert_same(worker, whole)
    assert whole[1]["loss"] > 0.01


def test_two_processes_train_as_one(tmp_path):
    runs = one_and_two_processes(tmp_path, [("retokenized", 0, ["cross_tokenizer"])])
    all_seen, seen, other_seen = assert_alike(runs, "retokenized cross_tokenizer")
    assert len(seen) == len(other_seen) == 4 and sum(seen) + sum(other_seen) == sum(all_seen)
    assert seen != other_seen  # tokens with a label: the processes hold texts of unequal length


def test_sequences_that_share_a_row_give_the_same_as_rows_of_their_own(tmp_path):
    own, other = llama_tokenizer(), bytes_tokenizer()
    student, teacher = model_for(own), model_for(other, seed=1)
    rows = rows_of(own)
    packed = Dataset.from_dict(sequence_packer(40)(rows[:]))
    assert len(packed) < len(rows)
    apart = step(tmp_path, student, CrossTokenizerTeacher(teacher, other), own)
    together = step(tmp_path, student, CrossTokenizerTeacher(teacher, other), own, rows=packed)
    assert_same(together, apart)


def test_the_signals_are_the_teachers_own_forward_on_its_own_tokens(tmp_path):
    own, other = llama_tokenizer(), bytes_tokenizer()
    student, model = model_for(own), model_for(other, seed=1)
    teacher = CrossTokenizerTeacher(model, other)
    teacher.meet(student, own)
    teacher.place(torch.device("cpu"))
    batch = CausalCollator(own)([dict(row) for row in rows_of(own)])
    found = teacher.signals(batch, positions=None)
    at = 0
    for text in TEXTS:
        ids = [*other(text, add_special_tokens=False)["input_ids"], other.eos_token_id]
        logits = model(torch.tensor([ids])).logits[0]
        while at < len(found.links.other):
            number, token, _ = found.links.other[at].tolist()
            places = [
                place
                for place in range(1, len(ids))
                if torch.allclose(logits[place - 1], found.logits[number], atol=1e-4)
            ]
            if not places:
                break
            assert any(ids[place] == token for place in places)
            at += 1
    assert at == len(found.links.other) > 20
    assert found.links.own[:, 0].tolist() == sorted(set(found.links.own[:, 0].tolist()))


def test_what_the_teachers_positions_have_no_room_for_is_not_compared(tmp_path):
    own, other = llama_tokenizer(), bytes_tokenizer()
    teacher = CrossTokenizerTeacher(model_for(other, seed=1, max_position_embeddings=6), other)
    teacher.meet(model_for(own), own)
    batch = CausalCollator(own)([dict(row) for row in rows_of(own)])
    found = teacher.prefetch(batch, None)
    assert found["teacher_ids"].shape[1] == 6 and len(found["teacher_tokens"]) > 0
    assert (found["teacher_tokens"][:, 0] % 6 < 5).all()
    roomy = CrossTokenizerTeacher(model_for(other, seed=1), other)
    roomy.meet(model_for(own), own)
    assert len(roomy.prefetch(batch, None)["same_chunks"]) > len(found["same_chunks"])


def test_a_student_that_learns_comes_nearer_and_a_resumed_training_ends_alike(tmp_path):
    own, other = llama_tokenizer(), bytes_tokenizer()
    teacher = model_for(other, seed=1)
    options = {"processing_class": own, "data_collator": CausalCollator(own)}
    settings = {"max_steps": 12, "save_steps": 6, "save_strategy": "steps", "per_device_train_batch_size": 4}

    def trained(folder, resume=None):
        student = model_for(own)
        trainer = trainer_of(
            folder, student, CrossTokenizerTeacher(teacher, other), rows_of(own), TERM, **options, **settings
        )
        trainer.train(resume_from_checkpoint=resume)
        return student, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    student, losses = trained(tmp_path / "whole")
    assert losses[-1] < 0.8 * losses[0]
    again, _ = trained(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-6"))
    for (name, tensor), other_tensor in zip(student.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(tensor, other_tensor), name


def test_a_teacher_without_its_students_tokenizer_or_of_another_kind_is_refused(tmp_path):
    own, other = llama_tokenizer(), bytes_tokenizer()
    teacher = CrossTokenizerTeacher(model_for(other, seed=1), other)
    with pytest.raises(InputError, match=r"^processing_class: got .NoneType.; .*the student's tokenizer"):
        trainer_of(tmp_path, model_for(own), teacher, rows_of(own), TERM)
    with pytest.raises(InputError, match=r"^losses.logits: .*linked"):
        trainer_of(tmp_path, model_for(own), teacher, rows_of(own), {"logits": {}}, processing_class=own)
    with pytest.raises(InputError, match=r"^losses.cross_tokenizer: got 'a model'"):
        trainer_of(tmp_path, model_for(own), model_for(own, 1), rows_of(own), TERM, processing_class=own)
