"""`distill-llm cache` and a recipe that learns from what it wrote."""

import json

import pytest
import torch
import yaml
from builders.causal import causal_model, word_tokenizer
from typer.testing import CliRunner

import distill_llm
from distill_llm.checks.recipe import open_recipe
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.teachers import CachedTeacher

RUNNER = CliRunner()


@pytest.fixture
def files(tmp_path):
    """A tiny Llama with its tokenizer, and a text of random words."""
    model, tokenizer = causal_model(max_position_embeddings=64), word_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    draw = torch.Generator().manual_seed(0)
    rows = [" ".join(f"w{i}" for i in torch.randint(90, (20,), generator=draw).tolist()) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(rows) + "\n")
    return tmp_path


def command(files, *more: str):
    data = ["--task", "text", "--data", str(files / "text.txt"), "--max-length", "24"]
    return RUNNER.invoke(app, ["cache", str(files / "teacher"), *data, "--output-dir", str(files / "cache"), *more])


def recipe(files, **changes) -> dict:
    given = {
        "teacher": {"model": str(files / "teacher"), "cache": str(files / "cache")},
        "data": {"task": "text", "path": str(files / "text.txt"), "max_length": 24},
        "pruning": {"keep": 0.6, "calibration_examples": 8},
        "distillation": {"losses": {"logits": {}}, "max_steps": 3, "learning_rate": 0.01, "use_cpu": True},
        "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
    }
    return given | changes


def test_a_recipe_learns_from_the_cache_what_it_learns_from_the_teacher(files, monkeypatch):
    result = command(files, "--k", "200")  # all classes: exact
    assert result.exit_code == 0, result.output
    assert "outputs of" in result.output and "bytes each" in result.output
    opened, init = [], CachedTeacher.__init__
    monkeypatch.setattr(CachedTeacher, "__init__", lambda self, *given: (opened.append(self), init(self, *given))[1])
    cached = distill_llm.run(recipe(files), files / "run").metrics
    assert len(opened) == 1, "at the door, for the whole run"
    online = distill_llm.run(recipe(files, teacher={"model": str(files / "teacher")}), files / "online").metrics
    assert cached["student"]["score"] == pytest.approx(online["student"]["score"], rel=1e-3)
    assert cached["student"]["score"] != cached["rounds"][0]["score_compensated"], "something was learned"


@pytest.mark.slow
def test_draws_train_too_and_other_rows_are_refused_before_training(files):
    assert command(files, "--k", "20").exit_code == 0
    assert distill_llm.run(recipe(files), files / "run").metrics["retention"] > 0
    with pytest.raises(InputError, match="data"):
        other = recipe(files, data={"task": "text", "path": str(files / "text.txt"), "max_length": 16})
        distill_llm.run(other, files / "other")
    hidden = {"losses": {"logits": {}, "hidden": {}}, "max_steps": 1}
    with pytest.raises(InputError, match="distillation.losses.hidden: got 'a cached teacher'"):
        distill_llm.run(recipe(files, distillation=hidden), files / "other")


def test_a_damaged_cache_and_one_of_another_model_say_what_to_do(files, monkeypatch):
    assert command(files, "--k", "20").exit_code == 0
    other = causal_model(seed=1, max_position_embeddings=64)
    other.save_pretrained(files / "teacher")
    with pytest.raises(
        InputError,
        match=r"^teacher\.cache: got .*cache, made with another teacher'; choose another folder, or write the cache again",
    ):
        open_recipe(parse_recipe(recipe(files)))
    shard = next((files / "cache").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    causal_model(max_position_embeddings=64).save_pretrained(files / "teacher")
    with pytest.raises(InputError, match=r"^teacher\.cache: got .*shard-.* write the cache again into this folder"):
        open_recipe(parse_recipe(recipe(files)))

    def refuse(*_) -> None:
        raise InputError("dataset", "rows 1 and 2", fix="remove one of them")

    monkeypatch.setattr(CachedTeacher, "__init__", refuse)
    with pytest.raises(InputError, match="^data.path: got 'rows 1 and 2'; remove one of them$"):
        open_recipe(parse_recipe(recipe(files)))


def prompts(files) -> dict:
    """A data section of questions and answers under names of their own, in packed rows."""
    draw = torch.Generator().manual_seed(1)
    drawn = [[f"w{i}" for i in torch.randint(90, (6,), generator=draw).tolist()] for _ in range(40)]
    rows = [json.dumps({"question": " ".join(row[:3]), "answer": " ".join(row[3:])}) for row in drawn]
    (files / "answers.jsonl").write_text("\n".join(rows) + "\n")
    columns = {"prompt": "question", "response": "answer"}
    path = str(files / "answers.jsonl")
    return {"task": "prompts", "path": path, "columns": columns, "packing": True, "max_length": 24}


def cached_recipe(files, given: dict, *more: str):
    """`distill-llm cache` of a recipe that does not name its cache yet."""
    teacher = {name: value for name, value in given["teacher"].items() if name != "cache"}
    (files / "own.yaml").write_text(yaml.safe_dump(given | {"teacher": teacher}))
    return RUNNER.invoke(app, ["cache", str(files / "own.yaml"), "--output-dir", str(files / "cache"), *more])


@pytest.mark.slow
def test_a_recipe_with_named_columns_and_packed_rows_has_its_cache(files):
    given = recipe(files, data=prompts(files), seed=3)
    result = cached_recipe(files, given, "--k", "200", "--set", "seed=3")
    assert result.exit_code == 0, result.output
    cached = distill_llm.run(given, files / "run").metrics
    online = distill_llm.run({**given, "teacher": {"model": str(files / "teacher")}}, files / "online").metrics
    assert cached["student"]["score"] == pytest.approx(online["student"]["score"], rel=1e-3)


def test_a_padded_vocabulary_is_cut_and_the_cache_fits_a_student_without_the_padding(files):
    wide = causal_model(vocab_size=128, max_position_embeddings=64)
    wide.save_pretrained(files / "teacher")
    causal_model(layers=1, seed=1, max_position_embeddings=64).save_pretrained(files / "student")
    word_tokenizer().save_pretrained(files / "student")
    assert command(files, "--k", "200").exit_code == 0
    assert CachedTeacher(files / "cache").index.classes == len(word_tokenizer()) <= 100
    given = recipe(files, pruning=None, student={"model": str(files / "student")})
    cached = distill_llm.run(given, files / "run").metrics
    online = distill_llm.run({**given, "teacher": {"model": str(files / "teacher")}}, files / "online").metrics
    assert cached["student"]["score"] == pytest.approx(online["student"]["score"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": {"losses": {"logits": {}, "hidden": {}}}}, "distillation.losses.hidden: got 'a cached"),
        ({"distillation": {"losses": {"logits": {"temperature": 2.0}}}}, "distillation.losses.logits.temperature: got"),
        ({"distillation": {"losses": {"labels": {}}}}, "teacher.cache: got"),
        ({"distillation": None}, "teacher.cache: got"),
    ],
)
def test_a_recipe_that_no_cache_serves_is_refused_before_anything_is_written(files, changes, message):
    result = cached_recipe(files, recipe(files, **changes), "--k", "20")
    assert result.exit_code == 2 and message in result.output and not (files / "cache").exists(), result.output


def test_a_recipe_and_options_that_it_says_itself_do_not_go_together(files):
    result = cached_recipe(files, recipe(files), "--max-length", "16")
    assert result.exit_code == 2 and "--max-length: got 16; leave it out: the recipe sets it" in result.output
    arguments = ["cache", str(files / "teacher"), "--output-dir", str(files / "cache")]
    for more, message in ((["--set", "seed=1"], "--set: got 'seed=1'"), ([], "--task: not given")):
        result = RUNNER.invoke(app, [*arguments, *more])
        assert result.exit_code == 2 and message in result.output


def test_a_cache_is_of_one_precision_which_the_recipe_may_name(files):
    assert command(files, "--k", "20", "--dtype", "bfloat16").exit_code == 0
    assert CachedTeacher(files / "cache").index.settings.dtype == "bfloat16"
    next((files / "cache").glob("shard-*")).unlink()  # as if it had been stopped
    result = command(files, "--k", "20")  # on the CPU float32
    assert result.exit_code == 2 and "made with another dtype (bfloat16, not float32)" in result.output
    assert command(files, "--k", "20", "--dtype", "bfloat16").exit_code == 0
    named = recipe(files)
    named["teacher"]["dtype"] = "float32"
    with pytest.raises(
        InputError, match="^teacher.dtype: got 'float32'; leave it out, or set it to bfloat16, the dtype"
    ):
        distill_llm.run(named, files / "run")
    assert not (files / "run").exists()
    named["teacher"]["dtype"] = "bfloat16"
    assert open_recipe(parse_recipe(named)).recipe.teacher.dtype == "bfloat16"
    result = cached_recipe(files, named, "--k", "20", "--dtype", "float32")
    assert (
        result.exit_code == 2
        and "--dtype: got 'float32'; leave it out, or set it to bfloat16, the recipe's" in result.output
    )
    assert cached_recipe(files, named, "--k", "20").exit_code == 0, "the recipe's"


@pytest.mark.parametrize(
    ("option", "message"),
    [("--k=0", "k: got 0"), ("--method=best", "got 'best'"), ("--dtype=int8", "--dtype: got 'int8'")],
)
def test_bad_options_are_one_line(files, option, message):
    result = command(files, option)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_adapters_learn_and_the_student_is_saved_without_them(files):
    given = recipe(
        files,
        teacher={"model": str(files / "teacher")},
        student={"peft": {"r": 4, "target_modules": ["q_proj", "up_proj"]}},
    )
    metrics = distill_llm.run(given, files / "run").metrics
    student = distill_llm.load_pretrained(files / "run" / "student")
    assert type(student).__name__ == "PrunedLlamaForCausalLM"
    before = distill_llm.load_pretrained(files / "run" / "round-1" / "pruned").state_dict()
    changed = {
        name.split(".")[-2] for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"q_proj", "up_proj"} and metrics["retention"] > 0
    with pytest.raises(InputError, match="student.peft.rank: got 4"):
        distill_llm.run(recipe(files, student={"peft": {"rank": 4}}), files / "other")


def test_a_quantised_teacher_teaches(files):
    pytest.importorskip("bitsandbytes")
    given = recipe(files, teacher={"model": str(files / "teacher"), "quantization": "8bit"})
    assert distill_llm.run(given, files / "run").metrics["retention"] > 0
