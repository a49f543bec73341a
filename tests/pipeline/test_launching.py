"""The launch configurations of recipes/accelerate: what accelerate reads in them, and whole runs under FSDP2 and ZeRO-3."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from builders.causal import causal_model, word_tokenizer
from builders.processes import run_script

from distill_llm import load_pretrained

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}


def variables(name):
    """What `accelerate launch` sets for a configuration."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "script.py"])
    arguments, config, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_every_launch_configuration(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name] and config.num_processes == 2 and not config.use_cpu
    assert f"--config_file recipes/accelerate/{name}.yaml" in (FOLDER / f"{name}.yaml").read_text()
    assert {path.stem for path in FOLDER.iterdir()} == KINDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_run_under_the_settings_of_sharding_ends_with_the_student_of_one_process(tmp_path, name):
    if name == "zero3":
        pytest.importorskip("deepspeed")
    for part in (causal_model(max_position_embeddings=64), word_tokenizer()):
        part.save_pretrained(tmp_path / "teacher")
    draw = torch.Generator().manual_seed(0)
    rows = [" ".join(f"w{i}" for i in torch.randint(90, (20,), generator=draw).tolist()) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(rows) + "\n")
    recipe = {
        "teacher": {"model": str(tmp_path / "teacher")},
        "data": {"task": "text", "path": str(tmp_path / "text.txt"), "max_length": 24},
        "pruning": {"keep": 0.6, "calibration_examples": 8},
        "distillation": {"losses": {"logits": {}}, "max_steps": 3, "learning_rate": 0.1, "optim": "sgd"},
        "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
    }
    sizes = {1: 8, 2: 4}
    sharded = {key: value for key, value in variables(name).items() if key.startswith(("FSDP", "ACCELERATE"))}
    students = []
    for processes in sizes:
        recipe["distillation"]["per_device_train_batch_size"] = sizes[processes]
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
        run_script("run_sharded.py", tmp_path, processes=processes, **(sharded if processes > 1 else {}))
        students.append(load_pretrained(tmp_path / f"run-{processes}" / "student").state_dict())
    assert students[0].keys() == students[1].keys()
    for key, tensor in students[0].items():
        torch.testing.assert_close(students[1][key], tensor, rtol=1e-3, atol=1e-5, msg=key)
