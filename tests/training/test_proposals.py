"""Answers that student and teacher write together: their exact distributions, their weights, and what is learnt from them."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml
from builders.answers import TOKENIZER, answering_trainer, prompt_rows
from builders.causal import causal_model
from builders.pairs import one_and_two_processes
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from distill_llm.common.errors import InputError
from distill_llm.data.encoding import collator
from distill_llm.losses.objective import Responses, parse_objective
from distill_llm.losses.terms.term import Gives, Use
from distill_llm.recipe.sections import DataSection
from distill_llm.responses.sampling import Draw
from distill_llm.teachers import Ensemble, OnlineTeacher
from distill_llm.training.on_policy import ANSWERED, IMPORTANCE, MARK, StudentResponses
from distill_llm.training.proposals import Alongside, Mixed, Replaced

SIZE, POINTS = 5, 96

pytestmark = pytest.mark.slow


def small(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def probabilities(model, ids, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)


def pairs_of(points):
    """Every pair of numbers of a grid in [0, 1)."""
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return torch.cartesian_prod(grid, grid)


def written(student, teacher, guide, uniforms, prompt):
    """(B, 2) tokens that generation writes behind a prompt, which is padded on the left."""
    ids = torch.tensor([[0, *prompt]]).expand(len(uniforms), -1)
    mask = torch.tensor([[0, *[1] * len(prompt)]]).expand(len(uniforms), -1)
    processor = guide(Alongside(teacher, mask, SIZE))
    with torch.no_grad():
        found = student.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=2,
            do_sample=False,
            logits_processor=LogitsProcessorList([processor, Draw(uniforms, ids.shape[1])]),
        )[:, ids.shape[1] :]
    return found, processor


def joint(found):
    counts = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    counts.index_put_((found[:, 0], found[:, 1]), torch.ones(len(found), dtype=torch.float64), accumulate=True)
    return counts / len(found)


def test_two_tokens_of_a_mixture_have_its_exact_distribution_and_weights():
    """A number falls into each token's span in proportion to its probability, so a grid of numbers counts exactly."""
    student, teacher, prompt, share = small(0), small(1), [3, 1, 4], 0.3
    found, processor = written(student, teacher, lambda there: Mixed(there, share, 1.0), pairs_of(POINTS), prompt)

    def mixture(ids):
        return share * probabilities(teacher, ids) + (1 - share) * probabilities(student, ids)

    first = mixture(prompt)
    exact = torch.stack([first[token] * mixture([*prompt, token]) for token in range(SIZE)])
    torch.testing.assert_close(joint(found), exact, rtol=0, atol=1.5 / POINTS)
    assert (exact - torch.outer(first, first)).abs().max() > 0.02  # the second token depends on the first

    processor.taken(found[:, -1])
    weights = processor.of(found.tolist())
    for row in range(0, len(found), 397):
        for place, token in enumerate(found[row].tolist()):
            before = [*prompt, *found[row, :place].tolist()]
            expected = probabilities(student, before)[token] / mixture(before)[token]
            assert weights[row][place] == pytest.approx(expected.item(), rel=1e-4)
    expectation = sum(row[0] for row in weights) / len(weights)
    assert expectation == pytest.approx(1, abs=0.05)  # a density over another one


@pytest.mark.parametrize("accepted", [1, 2, SIZE])
def test_a_proposal_stays_among_the_teachers_likeliest_and_else_the_teacher_draws(accepted):
    student, teacher, prompt, temperature = small(0), small(1), [3, 1, 4], 0.7
    numbers = pairs_of(POINTS)
    for step in (0, 1):  # the grid is of the proposal and the draw of one step; the other step has numbers of its own
        other = torch.rand(len(numbers), 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        proposals, draws = other.clone(), other.flip(-1).clone()
        proposals[:, step], draws[:, step] = numbers[:, 0], numbers[:, 1]
        guide = lambda there, proposals=proposals: Replaced(there, accepted, temperature, proposals)  # noqa: E731
        found, _ = written(student, teacher, guide, draws, prompt)

        def exact(ids):
            own, given = probabilities(student, ids), probabilities(teacher, ids, temperature)
            kept = torch.zeros(SIZE, dtype=torch.float64)
            best = probabilities(teacher, ids).topk(accepted).indices
            kept[best] = own[best]
            return kept + (1 - kept.sum()) * given

        if step == 0:
            counted = found[:, 0].bincount(minlength=SIZE) / len(found)
            torch.testing.assert_close(counted.double(), exact(prompt), rtol=0, atol=2.5 / POINTS)
            continue
        for token in found[:, 0].unique().tolist():
            after = found[found[:, 0] == token, 1]
            statistic = (after.bincount(minlength=SIZE) - len(after) * exact([*prompt, token])).abs().max() / len(after)
            assert statistic < 2 / len(after) ** 0.5


def test_greedy_proposals_are_the_students_likeliest_and_replaced_by_the_teachers():
    student, teacher, prompt = small(0), small(1), [2, 1]

    processor = Replaced(Alongside(teacher, torch.ones(1, 2, dtype=torch.long), SIZE), 1, 0.0, None)
    with torch.no_grad():
        scores = processor(torch.tensor([prompt]), student(torch.tensor([prompt])).logits[:, -1])
    assert scores.argmax().item() == probabilities(teacher, prompt).argmax().item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_teacher_alongside_says_what_it_says_of_the_whole_text(family):
    teacher = causal_model(family)
    rows = [[5, 6, 7, 8], [9, 10], [11]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    there = Alongside(teacher, mask, 90)
    new = torch.tensor([[12, 13, 14], [15, 16, 17], [18, 19, 20]])
    with torch.no_grad():
        for step in range(4):
            found = there(torch.cat([ids, new[:, :step]], dim=1), 100)
            for number, row in enumerate(rows):
                whole = teacher(torch.tensor([[*row, *new[number, :step].tolist()]])).logits[0, -1]
                torch.testing.assert_close(found[number, :90], whole[:90], rtol=1e-4, atol=1e-4)
            assert (found[:, 90:] == -torch.inf).all() and found.shape == (3, 100)


def seen_by(trainer):
    """What each micro-batch of a training holds, once it has run."""
    seen, compute = [], trainer.compute_loss

    def watching(model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items()})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = watching
    trainer.train()
    return seen


def outputs(model, ids, mask, labels):
    """Logits and labels of the tokens of a row that have one, without padding."""
    length = int(mask.sum())
    keep = labels[1:length] != -100
    return model(ids[None, :length]).logits[0, :-1][keep]


def stepped(student, before):
    for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - old.grad, rtol=1e-4, atol=1e-6, msg=name)


STEP = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}


@pytest.mark.parametrize("whole", [False, True])
def test_the_gradient_of_mixed_answers_is_weighted_token_by_token(tmp_path, monkeypatch, whole):
    if whole:
        monkeypatch.setattr("distill_llm.training.loss.output_head", lambda model: None)
    rows, student, teacher = prompt_rows(), causal_model(), causal_model(num_hidden_layers=3)
    before = copy.deepcopy(student).eval()
    responses = {"share": 1.0, "max_new_tokens": 4, "by": "mixed", "teacher_share": 0.5, "clip": 1.2}
    losses = {"logits": {"divergence": "reverse_kl"}, "responses": responses}
    (batch,) = seen_by(answering_trainer(tmp_path, student, teacher, rows, losses, **STEP))
    total, count, weights = torch.zeros(()), 0, []
    for ids, mask, labels, importance in zip(
        *(batch[name] for name in ("input_ids", "attention_mask", "labels", IMPORTANCE)), strict=True
    ):
        own = outputs(before, ids, mask, labels).log_softmax(-1)
        with torch.no_grad():
            given = outputs(teacher.eval(), ids, mask, labels).log_softmax(-1)
            taken = ids[labels != -100][:, None]
            mixture = torch.logaddexp(own, given) - torch.log(torch.tensor(2.0))
            weight = (own - mixture).exp().gather(1, taken).squeeze(1).clamp(max=1.2)
        torch.testing.assert_close(importance[labels != -100], weight, rtol=1e-3, atol=1e-4)
        weights += weight.tolist()
        total, count = total + (weight * (own.exp() * (own - given)).sum(-1)).sum(), count + len(own)
    assert max(weights) == pytest.approx(1.2) and min(weights) < 0.9
    (total / count).backward()
    stepped(student, before)


@pytest.mark.parametrize("whole", [False, True])
def test_answers_beside_the_data_learn_from_another_divergence(tmp_path, monkeypatch, whole):
    if whole:
        monkeypatch.setattr("distill_llm.training.loss.output_head", lambda model: None)
    rows, student, teacher = prompt_rows(), causal_model(), causal_model(num_hidden_layers=3)
    before = copy.deepcopy(student).eval()
    responses = {"share": 1.0, "max_new_tokens": 4, "beside": True}
    losses = {"distillm2": {"skew": 0.2, "beta": 0.3}, "responses": responses}
    (batch,) = seen_by(answering_trainer(tmp_path, student, teacher, rows, losses, **STEP))
    assert batch[ANSWERED].tolist() == [False] * 4 + [True] * 4 and MARK not in batch
    prompts = [ids[labels == -100] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    total, count = torch.zeros(()), 0
    for row, (ids, mask, labels) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ):
        own = outputs(before, ids, mask, labels).softmax(-1)
        with torch.no_grad():
            given = outputs(teacher.eval(), ids, mask, labels).softmax(-1)
        if row < 4:
            value = 0.7 * (given * (given.log() - (0.2 * given + 0.8 * own).log())).sum()
            shared = min(len(prompts[row]), len(prompts[row + 4]))
            assert torch.equal(prompts[row][: shared // 2], prompts[row + 4][: shared // 2])
        else:
            value = 0.3 * (own * (own.log() - (0.8 * given + 0.2 * own).log())).sum()
        total, count = total + value, count + len(own)
    (total / count).backward()
    stepped(student, before)


def test_speculative_answers_hold_no_token_that_the_teacher_finds_unlikely(tmp_path):
    rows, student, teacher = prompt_rows(), causal_model(), causal_model(num_hidden_layers=3)
    pad = collator(rows.task, TOKENIZER)
    batch = pad([dict(rows.train[row]) for row in range(4)])

    def made(**settings):
        answers = StudentResponses(Responses(max_new_tokens=6, **settings), pad, 0, OnlineTeacher(teacher))
        return answers(student, batch, 0)

    greedy = made(by="speculative", accepted=1, temperature=0)
    for ids, labels in zip(greedy["input_ids"], greedy["labels"], strict=True):
        places = (labels != -100).nonzero().flatten().tolist()
        for place in places:
            with torch.no_grad():
                assert ids[place] == teacher.eval()(ids[None, :place]).logits[0, -1, : len(TOKENIZER)].argmax()
    plain, everything = made(), made(by="speculative", accepted=1000)
    assert IMPORTANCE not in everything and not torch.equal(greedy["input_ids"], plain["input_ids"])
    assert len(everything["input_ids"]) == len(plain["input_ids"])


@pytest.mark.parametrize("by", ["mixed", "speculative", "beside"])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, by):
    rows, teacher = prompt_rows(), causal_model(num_hidden_layers=3)
    how = {"beside": True} if by == "beside" else {"by": by}
    losses = {"distillm2" if by == "beside" else "logits": {}, "responses": {"max_new_tokens": 4, "share": 0.7, **how}}
    whole, args = causal_model(), {"max_steps": 4, "learning_rate": 1e-2}
    answering_trainer(tmp_path / "a", whole, teacher, rows, losses, **args).train()
    args |= {"save_strategy": "steps", "save_steps": 2}
    answering_trainer(tmp_path / "b", causal_model(), teacher, rows, losses, **args).train()
    resumed = causal_model()
    trainer = answering_trainer(tmp_path / "b", resumed, teacher, rows, losses, **args)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_two_processes_write_and_learn_as_one(tmp_path):
    names = ["1.0 mixed", "1.0 speculative", "1.0 beside"]
    one, two, other = one_and_two_processes(tmp_path, [("answers", 0, names)])
    for name in names:
        weights, logs, _ = one[f"answers {name}"]
        for parameter, tensor in weights.items():
            torch.testing.assert_close(
                two[f"answers {name}"][0][parameter], tensor, rtol=2e-4, atol=2e-5, msg=parameter
            )
            assert torch.equal(two[f"answers {name}"][0][parameter], other[f"answers {name}"][0][parameter])
        for first, second in zip(logs, two[f"answers {name}"][1], strict=True):
            assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"teacher_share": 0.3}, r"responses.teacher_share: got 0.3; leave it out, or set by to mixed"),
        ({"by": "mixed", "accepted": 5}, r"responses.accepted: got 5; .*speculative"),
        ({"by": "mixed", "temperature": 0}, r"responses.temperature: got 0.*leave it out"),
        ({"by": "mixed", "top_p": 0.9}, r"responses.top_p: got 0.9; leave it out"),
        ({"by": "other"}, r"responses.by: "),
        ({"beside": True}, r"responses.beside: got True; .*leave out labels"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings, line):
    with pytest.raises(InputError, match=line):
        parse_objective({"labels": {}, "logits": {}, "responses": settings})


def test_only_a_model_in_memory_writes_with_the_student(tmp_path):
    objective = parse_objective({"logits": {}, "responses": {"by": "mixed"}})
    (fault,) = objective.faults(Use(teacher=Gives("an ensemble")))
    assert str(fault).startswith("losses.responses.by: got 'mixed'; accepted: student: an ensemble cannot write")
    several = Ensemble([causal_model(seed=1), causal_model(seed=2)])
    with pytest.raises(InputError, match=r"^losses.responses.by: got 'mixed'; .*an ensemble"):
        answering_trainer(tmp_path, causal_model(), several, prompt_rows(), objective)


def test_a_value_of_whole_logits_is_that_of_the_head(tmp_path):
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    value = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    from distill_llm.losses.signals import Batch, Signals

    batch = Batch(
        Signals(logits=teacher), None, torch.ones(1, 7), student=Signals(logits=student), weights=torch.arange(6.0)
    )
    term = parse_objective({"logits": {}}).terms()["logits"]

    class Whole:
        classes = None

    torch.testing.assert_close(term.sum(batch, Whole(), []), (value * torch.arange(6.0)).sum())


def test_the_objectives_of_the_page_are_read():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "responses.md").read_text()
    given = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    objectives = [parse_objective(each["losses"]) for each in given if "losses" in each]
    assert [each.responses.by for each in objectives] == ["student", "student", "mixed"]
    (data,) = [each["data"] for each in given if "data" in each]
    assert DataSection.model_validate(data).answers.top == 1
