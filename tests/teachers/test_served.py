"""A served teacher against the same model in memory: what a student learns, what a cache holds, what goes wrong."""

import copy
import math
import pickle
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.causal import word_tokenizer
from builders.models import tiny_model
from builders.served import Service, serving
from builders.trainers import NO_DROPOUT, causal_model, rows, trainer_of
from datasets import Dataset
from transformers import default_data_collator

from distill_llm.common.errors import InputError
from distill_llm.models import endpoint as endpoints
from distill_llm.models.endpoint import Client, Endpoint
from distill_llm.models.served_logprobs import Asking, ServedLogprobs
from distill_llm.teachers import CachedTeacher, OnlineTeacher
from distill_llm.teachers.cache_contents import ServedIdentity
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache
from distill_llm.teachers.served import ServedTeacher

TOKENS = 97
FORMS = ["prompt_logprobs", "echo"]


def model_of(seed, vocabulary=TOKENS):
    """A model that is sure of some of its tokens; what it gives tokens that the tokenizer does not have is not little."""
    model = causal_model(layers=2, seed=seed, vocab_size=vocabulary)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return model


@pytest.fixture
def service():
    with serving(Service(model_of(1), word_tokenizer())) as found:
        yield found


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Requests are sent again at once; the waits are kept."""
    waits = []
    monkeypatch.setattr(endpoints.time, "sleep", waits.append)
    return waits


def endpoint_of(service, **settings) -> Endpoint:
    return Endpoint(service.url, service.name, **{"timeout": 20.0, "retries": 3, **settings})


def teacher_of(service, k=12, form="prompt_logprobs", **settings) -> ServedTeacher:
    return ServedTeacher(endpoint_of(service, **settings), service.tokenizer, Asking(k, form))


def data_of(student, count=8):
    """Rows of tokens that the tokenizer has."""
    data = [{**row, "input_ids": row["input_ids"] % (TOKENS - 4) + 4} for row in rows(student, count=count)]
    return [{**row, "labels": torch.where(row["labels"] < 0, -100, row["input_ids"])} for row in data]


def batch_of(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def sparse_kl(teacher, student, data, k, classes=TOKENS) -> float:
    """KL over the k likeliest tokens and all others as one, item by item, in fp64 by numpy."""
    batch = batch_of(data)
    counts = batch.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        p, q = (
            model(**batch).logits[:, :-1][counts].double().softmax(-1).numpy()
            if model is teacher
            else model(**batch).logits[:, :-1, :classes][counts].double().softmax(-1).numpy()
            for model in (teacher, student)
        )
    found = []
    for mine, theirs in zip(p, q, strict=True):
        top = np.argsort(-mine)[:k]
        top = top[top < classes]
        rest, other = 1 - mine[top].sum(), 1 - theirs[top].sum()
        parts = (mine[top] * np.log(mine[top] / theirs[top])).sum()
        found.append(parts + (rest * np.log(rest / other) if rest > 1e-12 else 0))
    return float(np.mean(found))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "vocabulary"), [(12, TOKENS), (TOKENS, TOKENS), (12, 104)])
def test_the_loss_is_that_of_the_model_in_memory(tmp_path, form, k, vocabulary):
    teacher, student = model_of(1, vocabulary), causal_model(layers=2, seed=2, vocab_size=TOKENS)
    data = data_of(student)
    with serving(Service(teacher, word_tokenizer())) as service:
        source = teacher_of(service, k, form)
        trainer = trainer_of(tmp_path, copy.deepcopy(student), source, data, {"logits": {}})
        trainer.train()
    expected = sparse_kl(teacher, student, data, k)
    assert trainer.state.log_history[0]["loss/logits"] == pytest.approx(expected, rel=1e-4)
    if k == TOKENS == vocabulary:
        online = trainer_of(tmp_path, copy.deepcopy(student), teacher, data, {"logits": {}})
        online.train()
        assert trainer.state.log_history[0]["loss/logits"] == pytest.approx(
            online.state.log_history[0]["loss/logits"], rel=1e-4
        )


@pytest.mark.slow
def test_students_end_alike_through_workers_faults_and_a_resume(tmp_path, service, at_once):
    student = causal_model(layers=2, seed=2, vocab_size=TOKENS)
    data, settings = data_of(student, 16), {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trained(source, resume=None, **more):
        own = copy.deepcopy(student)
        trainer_of(tmp_path, own, source, data, {"logits": {}}, **settings, **more).train(resume_from_checkpoint=resume)
        return list(own.parameters())

    whole = trained(teacher_of(service))
    service.faults += [500, "drop", 429, 503]
    for others in (
        trained(teacher_of(service, parallel=3)),
        trained(teacher_of(service), str(tmp_path / "checkpoint-2")),
        trained(teacher_of(service), dataloader_num_workers=2),
    ):
        assert all(torch.equal(a, b) for a, b in zip(whole, others, strict=True))
    assert not service.faults and 0.0 in at_once and len(at_once) == 4
    again = pickle.loads(pickle.dumps(teacher_of(service)))
    assert again.client.endpoint == endpoint_of(service) and again.classes == TOKENS


@pytest.mark.slow
def test_sequences_that_share_a_row_are_asked_apart(service):
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 3]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 7 + [0]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]),
    }
    teacher = teacher_of(service, k=TOKENS)
    positions = torch.tensor([0, 2, 5])
    targets = teacher.signals(batch, positions=positions).targets
    asked = sorted(body["prompt"] for body in service.asked)
    assert asked == [[4, 5, 6, 7], [8, 9, 10]]
    with torch.no_grad():
        parts = [service.model(torch.tensor([part])).logits[0].softmax(-1) for part in asked]
    expected = torch.stack([parts[0][0], parts[0][2], parts[1][1]])
    found = torch.zeros_like(expected).scatter_add_(1, targets.ids, targets.probabilities)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="^positions: got 'example 0 of the batch, token 6'"):
        teacher.signals(batch, positions=torch.tensor([6]))


@pytest.mark.slow
@pytest.mark.parametrize("k", [12, TOKENS])
def test_a_cache_of_a_server_is_that_of_the_model_and_goes_on_after_a_stop(tmp_path, service, k):
    student = causal_model(layers=2, seed=2, vocab_size=TOKENS)
    data = data_of(student, 24)
    plain = [{name: each.tolist() for name, each in row.items()} for row in data]
    dataset = Dataset.from_list(plain)
    settings = CacheSettings(k=k, method="topk", classes=TOKENS)
    writing = Writing(batch_size=4, shard_items=6, progress=False)

    def write(folder, teacher, identity):
        source = CacheSource(teacher, dataset, default_data_collator, identity, service.tokenizer)
        return write_cache(tmp_path / folder, source, settings, writing)

    def prefetched(folder):
        batch = batch_of(data)
        positions = (batch["labels"][:, 1:] != -100).nonzero()
        return CachedTeacher(tmp_path / folder).prefetch(batch, positions[:, 0] * 10 + positions[:, 1])

    write("memory", OnlineTeacher(service.model), service.model)
    identity = ServedIdentity(service.name)
    index = write("served", teacher_of(service, k), identity)
    assert len(index.shards) > 2
    one, other = prefetched("served"), prefetched("memory")
    if k == TOKENS:
        torch.testing.assert_close(one["cached_logits"].softmax(-1), other["cached_logits"].softmax(-1))
    else:
        for name in ("cached_ids", "cached_probabilities", "cached_rest"):
            torch.testing.assert_close(one[name], other[name], rtol=0.02, atol=2e-4)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "served").iterdir()}
    for number in (0, len(index.shards) - 1):
        index.shard_path(tmp_path / "served", number).unlink()
    before = len(service.asked)
    write("served", teacher_of(service, k), identity)
    assert {file.name: file.read_bytes() for file in (tmp_path / "served").iterdir()} == whole
    assert len(service.asked) - before < 16, "not all 14 examples again, after a first batch"
    with pytest.raises(InputError, match="^cache: .*another teacher"):
        write("served", teacher_of(service, k), ServedIdentity("other"))
    with pytest.raises(InputError, match="^settings: got 'topk with k=5'"):
        settings = replace(settings, k=5)
        write("fewer", teacher_of(service, k), identity)


def line(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 300 and "secret" not in text
    return text


def ask(service, k=12, form="prompt_logprobs", tokenizer=None, **settings):
    tokenizer = tokenizer or service.tokenizer
    client = Client(endpoint_of(service, **settings))
    return lambda: ServedLogprobs(client, tokenizer, Asking(k, form), TOKENS)([[4, 5, 6, 7]])


def test_what_goes_wrong_is_one_line(service, monkeypatch, at_once):
    """Unreachable, a refused key, an unknown model, no or fewer log-probabilities, other tokens."""
    gone = replace(endpoint_of(service), url="http://127.0.0.1:9/v1")
    assert line(Client(gone).check).startswith("server.url: got 'http://127.0.0.1:9/v1'; start the server, or correct")
    assert at_once == [], "the door does not wait"
    assert "tried 4 times" in line(lambda: Client(gone).post("completions", {}))
    assert len(at_once) == 3 and at_once[0] < at_once[1] < at_once[2]
    service.key = "right"
    monkeypatch.setenv("OTHER_KEY", "secret")
    refused = ask(service, key_variable="OTHER_KEY")
    assert line(refused).startswith("server.key_variable: got 'OTHER_KEY'; put a key that the server takes")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "the one is not set" in line(ask(service)) or "is not set" in line(ask(service))
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    ask(service)()
    assert service.headers[-1]["Authorization"] == "Bearer right"
    unknown = replace(endpoint_of(service), model="bigg")
    assert line(Client(unknown).check).startswith("server.model: got 'bigg'; accepted: 'big' (the nearest)")
    assert line(lambda: Client(unknown).post("completions", {"prompt": [4]})).startswith(
        "server.model: got 'bigg'; serve"
    )
    service.faults.append(400)
    assert "it answered 400 (not now)" in line(ask(service))
    for form, other in zip(FORMS, FORMS[::-1], strict=True):
        service.forms = (other,)
        assert line(ask(service, form=form)).startswith(f"server.form: got '{form}'; ")
        service.forms, service.most = (form,), 5
        assert line(ask(service, form=form)).startswith("server.k: got '12, and the server gives")
        service.most, service.shift = 1000, 1
        assert line(ask(service, form=form)).startswith(
            "server.model: got 'big (4 tokens sent, 4 read)'; serve a model with"
        )
        service.shift = 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@host/v1", "server.url: got 'http://...host'; take out"),
        ("http://host/v1?key=secret", "server.url: got 'http://...host'; take out"),
        ("me:secret@host/v1", "server.url: got '...'; take out"),
        ("http://host/v1/@secret", "server.url: got 'http://...host'; take out"),
        ("host:8000", "server.url: got 'host:8000'; accepted: an address such as"),
        ("http://[host/v1", "server.url: got 'http://[host/v1'; accepted: an address such as"),
        ("http://host:80a/v1", "server.url: got 'http://host:80a/v1'; accepted: an address such as"),
        ("file:///tmp/x", "server.url: got 'file:///tmp/x'; accepted"),
    ],
)
def test_an_address_holds_no_key(url, message):
    assert line(lambda: Endpoint(url, "big")).startswith(message)


@pytest.mark.parametrize("key", ["sk-secret\u20acsecret", "sk-secret\nsecret"])
def test_a_key_that_no_header_holds_is_shown_nowhere(service, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="^server.key_variable: got 'OPENAI_API_KEY, with characters") as caught:
        ask(service)()
    assert "secret" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("OPENAI_API_KEY", " right\r\n")  # as files of keys end
    service.key = "right"
    ask(service)()


def test_a_server_that_is_out_for_today_is_a_fault_now(service, at_once):
    for asked in ("3", "nan", "Wed, 21 Oct 2026 07:28:00 GMT", "86400", "inf"):
        service.faults, service.retry_after = [429], asked
        if asked in ("86400", "inf"):
            assert "go on later: it answered status 429, and asks to wait for" in line(ask(service))
        else:
            ask(service)()
    assert at_once[0] == 3 and len(at_once) == 3 and all(0 < wait <= 0.5 for wait in at_once[1:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scores", [lambda p: math.exp(p), lambda p: 5 + p, lambda p: math.nan, lambda p: p / 2])
def test_scores_that_are_no_log_probabilities_are_refused(service, form, scores):
    """Probabilities, logits, what is no number, and probabilities of a high temperature that were not normalised."""
    plain = service.tops
    service.tops = lambda ids, k: [{token: scores(p) for token, p in place.items()} for place in plain(ids, k)]
    assert "are not numbers, or add up to more than 1" in line(ask(service, k=TOKENS, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_characters_may_be_written_in_other_ways(service, form):
    plain, ids = service.word, [4, 5, 6, 7]
    service.word = lambda token: "\ufffd" if token == 6 else plain(token)
    client = Client(endpoint_of(service))
    (found,) = ServedLogprobs(client, service.tokenizer, Asking(12, form), TOKENS)([ids])
    expected = service.log_p(ids)[:-1].exp().gather(-1, found.ids).float()
    held = found.probabilities > 0
    torch.testing.assert_close(found.probabilities[held], expected[held], rtol=1e-4, atol=1e-6)
    assert held.sum() >= 12 * 3 - 3
    service.word = lambda token: "\ufffd" if token in (5, 6, 7) else plain(token)
    assert line(ask(service, form=form)).startswith("server.model: got 'big (4 tokens sent")


def test_students_that_a_server_cannot_teach(service, tmp_path):
    classifier = tiny_model(layers=1, **NO_DROPOUT)
    with pytest.raises(InputError, match="^teacher: got 'a served teacher for BertForSequenceClassification'"):
        trainer_of(tmp_path, classifier, teacher_of(service), rows(classifier), {"logits": {}})
    student = causal_model(layers=1, vocab_size=90)
    with pytest.raises(InputError, match="^teacher: got 'a student with 90 outputs'"):
        teacher_of(service).meet(student)
    with pytest.raises(InputError, match=r"^losses.logits.temperature: got 2.0"):
        trainer_of(tmp_path, student, teacher_of(service), rows(student), {"logits": {"temperature": 2.0}})
    with pytest.raises(InputError, match=r"^server.k: got 98"):
        teacher_of(service, k=98)
