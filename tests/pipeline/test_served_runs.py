"""A served teacher in whole runs and commands: it teaches, fills a cache, answers prompts; no key is written anywhere."""

import json
import re

import pytest
import torch
import yaml
from builders.causal import word_tokenizer
from builders.recipes import causal_recipe, faults_at_the_door, recipe_for, write_decoder, write_model, write_rows
from builders.runs import weights
from builders.served import Service, serving
from builders.trainers import causal_model
from typer.testing import CliRunner

import distill_llm
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.endpoint import Endpoint
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.responses.respond import respond
from distill_llm.responses.settings import ResponseSettings

KEY = "secret-0123456789"
TRAINING = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
}


@pytest.fixture
def service(monkeypatch):
    """A server that wants a key, which the environment has."""
    model = causal_model(layers=2, seed=7, vocab_size=97)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serving(Service(model, word_tokenizer(), key=KEY)) as found:
        yield found


def recipe_of(folder, service, **server):
    write_decoder(folder / "teacher", max_position_embeddings=64)
    given = {"url": service.url, "model": "big", "k": 12, "key_variable": "TEACHER_KEY", "retries": 1, **server}
    changes = {"teacher__server": given, "distillation": {"losses": {"logits": {}}, **TRAINING}}
    return causal_recipe(folder, "prompts", **changes)


def as_given(recipe, **teacher):
    plain = recipe.model_dump(mode="json")
    return {**plain, "teacher": {**plain["teacher"], **teacher}}


@pytest.mark.slow
def test_a_recipe_learns_from_a_server_and_from_its_cache_alike_and_writes_no_key(tmp_path, service, capsys):
    recipe = recipe_of(tmp_path, service)
    online = distill_llm.run(recipe, tmp_path / "online").metrics
    assert online["served"] == {"model": "big", "k": 12} and len(service.asked) > 12
    assert "learnt from `big`, which was served" in (tmp_path / "online" / "report.md").read_text()
    page = (tmp_path / "online" / "report.html").read_text()
    card = (tmp_path / "online" / "student" / "README.md").read_text()
    assert "Learnt from" in page and "`big`, which was served" in card
    assert service.url not in card and service.url not in page
    load_pretrained(tmp_path / "online" / "student")

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(as_given(recipe)))
    command = ["cache", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    before = len(service.asked)
    cached = parse_recipe(as_given(recipe, cache=str(tmp_path / "cache")))
    distill_llm.run(cached, tmp_path / "cached")
    assert len(service.asked) == before, "the server is not asked again"
    states = [json.loads((tmp_path / name / "state.json").read_text())["stages"] for name in ("online", "cached")]
    losses = [state["round-1/recover"]["history"]["losses"]["loss/logits"] for state in states]
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and len(losses[0]) == 3
    one, start = weights(tmp_path / "online" / "student"), weights(tmp_path / "teacher")
    assert max((one[name] - start[name]).abs().max() for name in one) > 0.02, "something was learnt"

    model = {"teacher": {"model": str(tmp_path / "teacher"), "cache": str(tmp_path / "cache")}}
    (line,) = faults_at_the_door(parse_recipe({**as_given(recipe), **model}))
    assert line.startswith("teacher.cache: ") and "made with another teacher" in line
    told = capsys.readouterr()
    texts = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(KEY.encode() in text for text in texts) and KEY not in told.out + told.err + result.output


@pytest.mark.slow
def test_a_recipe_whose_teacher_is_served_goes_on_after_a_stop(tmp_path, service):
    recipe = recipe_of(tmp_path, service, form="echo")
    recipe = parse_recipe({**as_given(recipe), "distillation": {"losses": {"logits": {}}, **TRAINING, "save_steps": 1}})
    distill_llm.run(recipe, tmp_path / "whole")
    answer, count = service.answer, [0]

    def stops(body):
        count[0] += 1
        return answer(body) if count[0] < 12 else (400, {"error": {"message": "stopped"}})

    service.answer = stops
    with pytest.raises(InputError, match="answered 400"):
        distill_llm.run(recipe, tmp_path / "again")
    assert list((tmp_path / "again").rglob("checkpoint-1"))
    service.answer = answer
    distill_llm.run(recipe, tmp_path / "again")
    one, other = weights(tmp_path / "whole" / "student"), weights(tmp_path / "again" / "student")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_commands_take_a_server(tmp_path, service):
    recipe_of(tmp_path, service)
    where = ["--server", service.url, "--served-model", "big", "--key-variable", "TEACHER_KEY"]
    data = ["--task", "prompts", "--data", str(tmp_path / "chats.jsonl"), "--max-length", "16"]
    command = ["cache", str(tmp_path / "teacher"), *where, *data, "--output-dir", str(tmp_path / "cache"), "--k", "9"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "cache" / "index.json").read_text())["settings"]["method"] == "topk"
    for more, message in (
        (["--method", "sampled"], "--method: got 'sampled with k=9'; leave both out"),
        (["--served-model", "bigg"], "--served-model: got 'bigg'; accepted: 'big'"),
        (["--server", "http://127.0.0.1:9/v1"], "--server: got 'http://127.0.0.1:9/v1'; start the server"),
        (["--server-form", "chat"], "--server-form: got 'chat'; accepted: "),
        (["--key-variable", "NONE"], "--key-variable: got 'NONE'; put a key"),
    ):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    result = CliRunner().invoke(
        app, ["respond", str(tmp_path / "teacher"), *where, "--data", str(tmp_path / "chats.jsonl"), "--temperature", "0",
              "--max-new-tokens", "6", "--keep-truncated", "--output-dir", str(tmp_path / "answers")]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "answers" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and all("response_ids" not in row for row in rows)
    for row in rows[:3]:
        ids = word_tokenizer()(row["prompt"])["input_ids"]
        new, _ = service.generated({"prompt": ids, "max_tokens": 6, "temperature": 0})
        assert row["response"] == f" {word_tokenizer().decode(new)}" and row["finish_reason"] in ("stop", "length")
    given = as_given(recipe_of(tmp_path, service), server=None)
    given["data"]["path"] = str(tmp_path / "answers" / "train.jsonl")
    assert distill_llm.run(parse_recipe(given), tmp_path / "run").metrics["retention"] > 0


@pytest.mark.slow
def test_answers_go_on_after_a_stop_and_are_drawn_by_prompt(tmp_path, service):
    write_decoder(tmp_path / "teacher", max_position_embeddings=64)
    prompts = [f"w{number} w{number + 1}" for number in range(12)]
    settings = ResponseSettings(max_new_tokens=4, samples=2, batch_size=2, keep_truncated=True)
    there = Endpoint(service.url, "big", "TEACHER_KEY", retries=0)

    def answered(folder):
        respond(str(tmp_path / "teacher"), prompts, tmp_path / folder, settings, server=there, progress=False)
        return (tmp_path / folder / "train.jsonl").read_text()

    whole = answered("whole")
    assert len(whole.splitlines()) > 12, "two samples of a prompt differ"
    seeds = [body["seed"] for body in service.asked if body]
    assert len({*seeds}) == 24
    answer, done = service.answer, len(service.asked)
    service.answer = lambda body: answer(body) if len(service.asked) < done + 15 else (400, {})
    work = "distill_llm.responses.work.SHARD_TOKENS"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, 16)
        with pytest.raises(InputError, match="^server.url: .*answered 400"):
            answered("again")
        service.answer = answer
        assert answered("again") == whole
    assert len(service.asked) - done < 15 + 24 - 8
    with pytest.raises(InputError, match="teacher: got 'another one'"):
        respond(str(tmp_path / "teacher"), prompts, tmp_path / "again", settings, progress=False)


@pytest.mark.slow
def test_the_door_says_what_a_server_cannot_teach(tmp_path, service):
    recipe = recipe_of(tmp_path, service)
    assert faults_at_the_door(recipe) == []
    service.most = 5
    (line,) = faults_at_the_door(recipe)
    assert re.match("teacher.server.k: got '12, and the server gives [56]'; set it to", line) and len(line) <= 300
    (line,) = faults_at_the_door(
        parse_recipe({**as_given(recipe), "distillation": {"losses": {"logits": {"temperature": 2}}}})
    )
    assert line.startswith("distillation.losses.logits.temperature: got 2.0")
    write_model(tmp_path / "bert")
    write_rows(tmp_path / "rows.csv")
    given = recipe_for(tmp_path, teacher={"model": str(tmp_path / "bert"), "server": {"url": service.url}})
    (line,) = faults_at_the_door(parse_recipe(given))
    assert line.startswith("teacher.server: got ") and "the next token" in line


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"train": {}}, "teacher.train: got {}; remove it, or remove teacher.server"),
        ({"dtype": "bfloat16"}, "teacher.dtype: got 'bfloat16'; remove it, or remove teacher.server"),
        ({"ensemble": {"others": [{"model": "x"}]}}, "teacher.ensemble: got "),
        (
            {"server": {"url": "http://h/v1", "key_variable": "sk-0"}},
            "teacher.server.key_variable: got 'sk-0'; accepted",
        ),
        ({"server": {"url": "http://h/v1", "k": 0}}, "teacher.server.k: got 0; accepted: a whole number of at least 1"),
    ],
)
def test_the_recipe_refuses_what_a_server_does_not_go_with(tmp_path, teacher, message):
    given = recipe_for(tmp_path)
    given["teacher"] |= {"server": {"url": "http://h/v1"}, **teacher}
    with pytest.raises(InputError, match=re.escape(message)):
        parse_recipe(given)
