"""Students that learn from what the teacher says of their own answers."""

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from builders.answers import PROMPTS, TOKENIZER, answering_trainer, prompt_rows
from builders.causal import THINKING_TEMPLATE, causal_model, word_tokenizer, words
from builders.trainers import with_lora
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill_llm
from distill_llm import DistillationConfig, DistillationTrainer
from distill_llm.common.errors import InputError
from distill_llm.data.encoding import collator
from distill_llm.losses.objective import Responses, parse_objective
from distill_llm.losses.terms.term import Gives, Use
from distill_llm.recipe.recipe import load_recipe
from distill_llm.training.on_policy import ANSWERED, MARK, StudentResponses


def batch_of(rows):
    pad = collator(rows.task, TOKENIZER)
    return pad, pad([dict(rows.train[i]) for i in range(4)])


def greedy(model, ids, tokens):
    """A token at a time, without a cache and alone; the end token belongs to the answer."""
    found = []
    for _ in range(tokens):
        with torch.no_grad():
            found.append(int(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax()))
        if found[-1] == TOKENIZER.eos_token_id:
            break
    return found


def test_a_batch_has_the_prompts_and_the_students_own_answers():
    model = causal_model().eval().train()
    pad, batch = batch_of(prompt_rows())
    made = StudentResponses(Responses(temperature=0, max_new_tokens=5), pad, 0)(model, batch, 0)
    assert made.pop(MARK) and model.training and set(made) == {*batch, ANSWERED}
    for row in range(4):
        prompt = TOKENIZER(PROMPTS[row])["input_ids"]
        answer = greedy(model.eval(), prompt, 5)
        whole = prompt + answer
        assert made["input_ids"][row, : len(whole)].tolist() == whole
        assert made["labels"][row, : len(whole)].tolist() == [-100] * len(prompt) + answer
        assert made["attention_mask"][row].sum() == len(whole)
        assert (made["labels"][row, len(whole) :] == -100).all()


def test_draws_depend_on_seed_step_and_place_alone():
    model = causal_model()
    pad, batch = batch_of(prompt_rows())

    def drawn(seed=0, step=0, rows=slice(None)):
        chosen = {name: values[rows] for name, values in batch.items()}
        return StudentResponses(Responses(max_new_tokens=6), pad, seed)(model, chosen, step)["input_ids"]

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(seed=1)) and not torch.equal(drawn(), drawn(step=1))
    alone, together = drawn(rows=slice(0, 1))[0], drawn()[0]
    assert torch.equal(alone, together[: len(alone)])


@pytest.mark.parametrize("size", [4, 2, 1])
def test_the_same_prompt_in_a_step_gets_the_same_answers_however_the_batch_is_split(tmp_path, size):
    rows, answers = prompt_rows([PROMPTS[0]] * 12), []
    losses = {"logits": {}, "responses": {"share": 1.0, "max_new_tokens": 6, "temperature": 3.0}}
    for split in (4, size):
        sizes = {"per_device_train_batch_size": split, "gradient_accumulation_steps": 4 // split}
        trainer = answering_trainer(tmp_path, causal_model(), causal_model(num_hidden_layers=3), rows, losses, **sizes)
        batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 4 // split, torch.device("cpu"))
        answers.append([row[row != -100].tolist() for batch in batches for row in batch["labels"]])
    assert answers[0] == answers[1] and len(set(map(tuple, answers[0]))) == 4


def test_the_share_of_batches_is_the_students():
    answers = StudentResponses(Responses(share=0.3), batch_of(prompt_rows())[0], 0)
    chosen = [answers.chosen(step) for step in range(2000)]
    assert 0.25 < sum(chosen) / len(chosen) < 0.35


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_the_divergence_over_the_students_tokens(tmp_path, accumulation, monkeypatch):
    rows, student, teacher = prompt_rows(), causal_model(), causal_model(num_hidden_layers=3)
    before = copy.deepcopy(student).eval()
    losses = {
        "labels": {"weight": 1.0},
        "logits": {},
        "responses": {"share": 1.0, "temperature": 0, "max_new_tokens": 4},
    }
    size = 4 // accumulation
    trainer = answering_trainer(
        tmp_path,
        student,
        teacher,
        rows,
        losses,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    seen = []
    monkeypatch.setattr(
        trainer,
        "compute_loss",
        lambda m, inputs, *a, _f=trainer.compute_loss, **k: (
            seen.append({n: v.clone() for n, v in inputs.items()}),
            _f(m, inputs, *a, **k),
        )[1],
    )
    trainer.train()
    total = torch.zeros(())
    count = 0
    for batch in seen:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            ids = ids[: int(mask.sum())]
            keep = labels[1 : len(ids)] != -100
            with torch.no_grad():
                target = teacher.eval()(ids[None]).logits[0, :-1][keep].log_softmax(-1)
            own = before(ids[None]).logits[0, :-1][keep].log_softmax(-1)
            total, count = total + F.kl_div(own, target, reduction="sum", log_target=True), count + int(keep.sum())
    (total / count).backward()
    for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - old.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_log_has_the_mean_of_the_label_loss_over_the_steps_that_it_counted_in(tmp_path, accumulation):
    rows, student, teacher = prompt_rows(), causal_model(), causal_model(num_hidden_layers=3)
    losses = {"labels": {}, "logits": {}, "responses": {"share": 0.5, "max_new_tokens": 4}}
    settings = {"per_device_train_batch_size": 12 // accumulation, "gradient_accumulation_steps": accumulation}
    args = {"max_steps": 6, "learning_rate": 0.0, "logging_steps": 2, **settings}  # each step sees all of the data
    trainer = answering_trainer(tmp_path, student, teacher, rows, losses, **args)
    trainer.train()
    answered = [trainer.responses.chosen(step) for step in range(6)]
    assert answered == [False, False, True, True, False, True]
    batch = collator(rows.task, TOKENIZER)([dict(row) for row in rows.train])
    with torch.no_grad():
        logits = student.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    logs = [log for log in trainer.state.log_history if "loss/logits" in log]
    assert [log.get("loss/labels") for log in logs] == [
        pytest.approx(expected, rel=1e-4),
        None,
        pytest.approx(expected, rel=1e-4),
    ]


def test_a_stopped_training_goes_on_with_the_same_draws(tmp_path):
    rows, teacher = prompt_rows(), causal_model(num_hidden_layers=3)
    losses = {"labels": {}, "logits": {}, "responses": {"max_new_tokens": 4}}
    whole, args = causal_model(), {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 2}
    unbroken = answering_trainer(tmp_path / "a", whole, teacher, rows, losses, **args)
    unbroken.train()
    args |= {"save_strategy": "steps", "save_steps": 2}
    answering_trainer(tmp_path / "b", causal_model(), teacher, rows, losses, **args).train()
    resumed = causal_model()
    trainer = answering_trainer(tmp_path / "b", resumed, teacher, rows, losses, **args)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    logs = [
        [{k: v for k, v in log.items() if k.startswith("loss")} for log in each.state.log_history]
        for each in (unbroken, trainer)
    ]
    assert logs[0] == logs[1] and any("loss/labels" in log for log in logs[0])


class Conversions(TorchDispatchMode):
    """Counts how often each tensor is converted to bfloat16, by its address."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapted", [False, True])
def test_answers_are_generated_in_mixed_precision_with_weights_converted_once_for_all_tokens(
    tmp_path, monkeypatch, adapted
):
    rows, teacher, plain = prompt_rows(), causal_model(num_hidden_layers=3), causal_model()
    student = with_lora(plain) if adapted else plain
    losses = {"logits": {}, "responses": {"share": 1.0, "temperature": 0, "max_new_tokens": 6}}
    trainer = answering_trainer(tmp_path, student, teacher, rows, losses, bf16=True, optim="sgd", learning_rate=1.0)
    conversions, dtypes, answer = Conversions(), [], StudentResponses.__call__

    def watched(self, *args):
        hook = plain.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
        with conversions:
            made = answer(self, *args)
        hook.remove()
        return made

    monkeypatch.setattr(StudentResponses, "__call__", watched)
    learned = {name: p for name, p in student.named_parameters() if p.requires_grad and p.dim() == 2}
    before = {name: p.detach().clone() for name, p in learned.items()}
    trainer.train()
    assert len(dtypes) == 6 and set(dtypes) == {torch.bfloat16}
    converted = {name: conversions.counts[p.data_ptr()] for name, p in learned.items() if "embed_tokens" not in name}
    assert set(converted.values()) == {1}, converted
    assert not any(torch.equal(p, before[name]) for name, p in learned.items())


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (Use(kind="token"), "losses.responses: got 'a student that does not generate'; accepted: a causal"),
        (
            Use(teacher=Gives("a cached teacher", new_text=False)),
            "losses.responses: got 'a cached teacher'; accepted: a teacher in memory",
        ),
        (
            Use(packed="data.packing"),
            "losses.responses: got 'rows of several sequences (data.packing)'; accepted: one prompt in each row",
        ),
        (Use(sharding="DeepSpeed"), "losses.responses: got 'a student sharded by DeepSpeed'; accepted: FSDP2"),
        (Use(sharding="FSDP1"), "losses.responses: got 'a student sharded by FSDP1'; accepted: FSDP2"),
        (Use(sharding="FSDP2", kind="next_token", teacher=Gives("a model")), None),
    ],
)
def test_students_that_cannot_generate_while_they_train_are_refused(use, line):
    found = [str(fault) for fault in parse_objective({"logits": {}, "responses": {}}).faults(use)]
    assert len(found) == (line is not None) and all(fault.startswith(str(line)) for fault in found)


def test_responses_that_pass_the_last_position_of_student_or_teacher_are_refused(tmp_path):
    rows, longest = prompt_rows(), max(len(prompt.split()) for prompt in PROMPTS)
    for student, teacher, short in ((32, 64, "student"), (64, 32, "teacher")):
        models = [causal_model(max_position_embeddings=size) for size in (student, teacher)]
        losses = {"logits": {}, "responses": {"max_new_tokens": 32 - longest}}
        given = {"data_collator": collator(rows.task, TOKENIZER), "processing_class": TOKENIZER}
        args = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True}
        DistillationTrainer(*models, DistillationConfig(losses=losses, **args), train_dataset=rows.train, **given)
        losses["responses"]["max_new_tokens"] += 1
        line = (
            f"losses.responses.max_new_tokens: got {33 - longest}; accepted: at most {32 - longest}: the {short} takes"
        )
        with pytest.raises(InputError, match=line):
            DistillationTrainer(*models, DistillationConfig(losses=losses, **args), train_dataset=rows.train, **given)


def test_packed_prompts_are_refused_before_the_first_step(tmp_path):
    rows, losses = prompt_rows(), {"logits": {}, "responses": {"max_new_tokens": 4}}
    answering_trainer(tmp_path, causal_model(), causal_model(seed=1), rows, losses)
    train = [{**row, "position_ids": [at % 2 for at in range(len(row["input_ids"]))]} for row in rows.train]
    line = r"^losses.responses: got 'rows of several sequences \(train_dataset\)'; accepted: one prompt in each row$"
    with pytest.raises(InputError, match=line):
        answering_trainer(tmp_path, causal_model(), causal_model(seed=1), replace(rows, train=train), losses)


def test_what_cannot_answer_is_refused(tmp_path):
    rows, teacher = prompt_rows(), causal_model()
    with pytest.raises(InputError, match="losses.responses: got 'labels alone'"):
        answering_trainer(tmp_path, causal_model(), teacher, rows, {"labels": {}, "responses": {}})
    # Terms that compare with the teacher where labels are, or weigh nothing, never count on answers.
    for terms, given in (
        ({"smoothing": {}}, "smoothing alone"),
        ({"labels": {}, "smoothing": {}}, "labels and smoothing alone"),
        ({"labels": {}, "logits": {"weight": 0}}, "labels alone"),
    ):
        with pytest.raises(
            InputError, match=rf"^losses\.responses: got '{given}'; accepted: a term that compares with"
        ):
            parse_objective({**terms, "responses": {"share": 1}})
    assert parse_objective({"smoothing": {}, "logits": {"weight": {"start": 0, "end": 1}}, "responses": {"share": 1}})
    with pytest.raises(InputError, match="losses.responses.share: got 0"):
        answering_trainer(tmp_path, causal_model(), teacher, rows, {"logits": {}, "responses": {"share": 0}})
    pad, batch = batch_of(rows)
    with pytest.raises(InputError, match=r"losses.responses: got 'rows of several sequences \(position_ids\)'"):
        StudentResponses(Responses(), pad, 0)(teacher, {**batch, "position_ids": batch["input_ids"]}, 0)


def test_the_recipe_teaches_a_smaller_model_on_its_own_answers_in_a_chat_and_scores_their_final_ones(tmp_path):
    tokenizer = word_tokenizer(chat_template=THINKING_TEMPLATE)

    def said_by(model, prompt):
        asked = tokenizer(f"user {prompt} </s> assistant w80 w81")["input_ids"]
        return tokenizer.decode(greedy(model, asked, 4), skip_special_tokens=True)

    for name, layers in (("teacher", 3), ("student", 2)):
        model = causal_model(num_hidden_layers=layers, max_position_embeddings=64)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if name == "teacher":  # an answer of its own in three of four rows, behind words that it does not say
            said = [said_by(model, prompt) for prompt in PROMPTS]
            assert all("w" in text for text in said)
            answers = [words(89) if row % 4 == 0 else f"{words(1, 2)} {text}" for row, text in enumerate(said)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"question": p, "answer": a}) for p, a in zip(PROMPTS, answers, strict=True)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    local = [
        f"teacher.model={tmp_path / 'teacher'}",
        f"student.model={tmp_path / 'student'}",
        f"data.path={tmp_path / 'data'}",
    ]
    local += ["data.max_length=32", "distillation.max_steps=2", "distillation.losses.responses.max_new_tokens=4"]
    local += [
        "evaluation.max_new_tokens=4",
        "evaluation.latency={batch_size: 2, sequence_length: 8}",
    ]
    local += ["distillation.per_device_train_batch_size=4", "distillation.learning_rate=0.01"]
    metrics = distill_llm.run(load_recipe("qwen_on_policy", local), tmp_path / "run").metrics
    assert metrics["metric"] == "final_answer" and metrics["teacher"]["score"] == 0.75
    assert metrics["retention"] == metrics["student"]["score"] / 0.75


def test_rows_of_a_padded_vocabulary_are_never_drawn():
    model = causal_model(vocab_size=128)  # the tokenizer has 97
    pad, batch = batch_of(prompt_rows())
    made = StudentResponses(Responses(max_new_tokens=8, temperature=5.0), pad, 0)(model, batch, 0)
    assert made["input_ids"].max() < len(TOKENIZER)


def test_text_has_no_prompts_to_answer(tmp_path):
    pad, batch = batch_of(prompt_rows())
    with pytest.raises(InputError, match="rows without a prompt"):
        StudentResponses(Responses(), pad, 0)(causal_model(), {**batch, "labels": batch["input_ids"]}, 0)
