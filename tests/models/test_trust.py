"""Code that comes with a model: it runs only where the user says so, and never by an answer on standard input."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.checkpoints import student_of
from builders.recipes import recipe_for, write_model, write_recipe, write_rows
from typer.testing import CliRunner

import distill_llm
from distill_llm import load_pretrained
from distill_llm.architectures.modeling_pruned import CODE_NAMES
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError

CODE = """
import pathlib
pathlib.Path({ran!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
class OwnTokenizer(BertTokenizer):
    pass
"""
MODEL = {
    "model_type": "own",
    "architectures": ["OwnForSequenceClassification"],
    "auto_map": {
        "AutoConfig": "own.OwnConfig",
        "AutoModel": "own.OwnModel",
        "AutoModelForSequenceClassification": "own.OwnForSequenceClassification",
    },
}
TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
ROWS = ["--task", "classification", "--data", "rows.csv", "--columns", "text=review,label=mood"]
COMMANDS = {
    "profile": ["profile", "own"],
    "profile --against": ["profile", "plain", "--against", "own"],
    "evaluate": ["evaluate", "own", *ROWS],
    "prune": ["prune", "own", *ROWS, "--keep", "0.5", "--output-dir", "out"],
    "cache": ["cache", "own", *ROWS[:4], "--output-dir", "out"],
    "respond": ["respond", "own", "--data", "prompts.jsonl", "--output-dir", "out"],
    "run": ["run", "recipe.yaml"],
    "run, student": ["run", "recipe.yaml", "--set", "pruning=null", "--set", "student.model=own", "--set", "teacher.model=plain"],
}  # fmt: skip


def changed(file: Path, values: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """A file that is there once the code of the folder `own` ran; the working directory has rows, prompts and a recipe."""
    monkeypatch.chdir(tmp_path)
    for name in ("own", "plain"):
        write_model(tmp_path / name, max_position_embeddings=160)
    file = tmp_path / "ran"
    (tmp_path / "own" / "own.py").write_text(CODE.format(ran=str(file)))
    write_rows(tmp_path / "rows.csv")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film"}\n')
    write_recipe(tmp_path, recipe_for(tmp_path, teacher={"model": "own"}))
    return file


def told(arguments: list[str]) -> str:
    """What a refused command says, to someone who answers yes to every question."""
    result = CliRunner().invoke(app, arguments, input="yes\n" * 99)
    assert result.exit_code == 2, result.output
    return result.stderr


def test_every_call_that_may_run_a_models_code_says_whether_it_may():
    unsaid = []
    for file in Path(distill_llm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                says = any(word.arg == "trust_remote_code" for word in node.keywords)
                # Settings and graphs: none holds code.
                plain = ast.unparse(node.func.value) in ("GenerationConfig", "ExportedModel", "AutoHfQuantizer")
                if node.func.attr in ("from_pretrained", "from_config") and not says and not plain:
                    unsaid.append(f"{file.name}:{node.lineno}")
    assert not unsaid


@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_code_runs_unless_it_is_trusted(ran, command, part):
    if part == "tokenizer" and command.startswith("profile"):
        pytest.skip("opens no tokenizer")
    changed(
        Path("own/config.json" if part == "model" else "own/tokenizer_config.json"),
        MODEL if part == "model" else TOKENIZER,
    )
    told_lines = told(COMMANDS[command])
    assert not ran.exists()
    way = "take a student without code" if command == "run, student" else "allow it with `"
    assert (
        "got 'own'; " in told_lines
        and way in told_lines
        and "trust_remote_code" not in told_lines.replace("`trust_remote_code`", "")
    )


def test_code_is_trusted_by_the_flag_for_that_model(ran):
    changed(Path("own/config.json"), MODEL)
    changed(Path("own/tokenizer_config.json"), TOKENIZER)
    for arguments in (COMMANDS["profile"], COMMANDS["evaluate"]):
        result = CliRunner().invoke(app, [*arguments, "--trust-remote-code"])
        assert result.exit_code == 0, result.output
    assert ran.exists()
    own = load_pretrained("own", trust_remote_code=True)
    plain = load_pretrained("plain").state_dict()
    assert type(own).__name__ == "OwnForSequenceClassification"
    assert all((value == plain[key]).all() for key, value in own.state_dict().items())


def test_a_stock_model_with_code_beside_it_is_loaded_as_the_stock_class(ran):
    changed(Path("own/config.json"), {"auto_map": MODEL["auto_map"]})
    assert CliRunner().invoke(app, COMMANDS["evaluate"], input="yes\n" * 99).exit_code == 0
    assert type(load_pretrained("own")).__name__ == "BertForSequenceClassification"
    assert not ran.exists()


@pytest.mark.parametrize("name", CODE_NAMES)
def test_a_pruned_model_is_loaded_only_beside_this_packages_code(tmp_path, name):
    student_of().save_pretrained(tmp_path)
    load_pretrained(tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    with pytest.raises(InputError, match=f"make the model again: its {name} is not"):
        load_pretrained(tmp_path, trust_remote_code=True)
    (tmp_path / name).unlink()
    load_pretrained(tmp_path)


@pytest.mark.slow
def test_an_answer_on_standard_input_runs_nothing(ran):
    changed(Path("own/config.json"), MODEL)
    env = os.environ | {"PYTHONPATH": str(Path(distill_llm.__file__).parents[1])}
    command = [sys.executable, "-m", "distill_llm", *COMMANDS["evaluate"]]
    done = subprocess.run(command, input="yes\n" * 99, text=True, capture_output=True, env=env, check=False)
    assert done.returncode == 2 and not ran.exists() and done.stderr.count("error: ") == 1
