"""Sharded over two processes (FSDP2), a language model trains as the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_llm.training.shards import clip_with

GRADIENTS = """
import os, sys
sys.path[:0] = {path!r}
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from builders.trainers import TERMS, causal_model, rows
from distill_llm.losses.objective import parse_objective
from distill_llm.teachers import as_teacher
from distill_llm.training.shards import whole as unsharded
from distill_llm.training.loss import TrainingLoss
dist.init_process_group("gloo")
rank = dist.get_rank()
teacher = causal_model()
data = rows(teacher, count=8)
halves = [{{name: torch.stack([row[name] for row in part]) for name in data[0]}} for part in (data[:4], data[4:])]
for tied in (False, True):
    for own in (False, True):
        for name in ("all", "hidden"):
            student = causal_model(layers=2, seed=1, tie_word_embeddings=tied).train()
            loss = TrainingLoss(parse_objective(TERMS[name]), student, as_teacher(teacher), None, torch.device("cpu"))
            assert (loss.head_terms is None) == (name == "hidden")
            factors = {{name: torch.tensor(0.01) for name in loss.objective.terms()}}
            expected = sum(loss(student, half, factors, 0, 1)[0] for half in halves) / 2
            expected.backward()
            whole = {{name: parameter.grad.clone() for name, parameter in student.named_parameters()}}
            student.zero_grad()
            for layer in student.model.layers:
                fully_shard(layer, reshard_after_forward=True)
            if own and not tied:
                fully_shard(student.lm_head, reshard_after_forward=True)
            fully_shard(student, reshard_after_forward=True)
            with unsharded(student), torch.no_grad():
                assert not any(isinstance(parameter, DTensor) for parameter in student.parameters())
                for _ in range(1 + rank):  # as answers of other lengths in each process
                    student(halves[rank]["input_ids"])
            assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
            loss(student, halves[rank], factors, 0, 1)[0].backward()
            for parameter_name, parameter in student.named_parameters():
                found = parameter.grad.full_tensor()
                torch.testing.assert_close(found, whole[parameter_name], rtol=1e-4, atol=1e-6, msg=parameter_name)
print("sharded as whole", flush=True)
dist.barrier()
os._exit(0)  # gloo's threads abort the interpreter's exit now and then
"""
# accelerate shards on accelerators only; told that the two CPU processes are some, it does here what it does there.
TRAINING = """
import os, sys
sys.path[:0] = {path!r}
import torch
from builders import trainers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from builders.causal import causal_model as talker
from test_on_policy import data as prompts, trainer_of as answering
import test_on_policy
from torch.distributed.tensor import DTensor
from builders.trainers import TERMS, DistillationConfig, causal_model, rows, trainer_of

processes = int(os.environ.get("WORLD_SIZE", 1))

class Config(DistillationConfig):
    def __post_init__(self):
        super().__post_init__()
        if processes > 1:
            assert self.device.type == "cpu"
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

trainers.DistillationConfig = test_on_policy.DistillationConfig = Config
own, answers, found = {{"per_device_train_batch_size": 8 // processes}}, {{"max_new_tokens": 16}}, {{}}

def keep(name, trainer, resume=None):
    assert trainer.is_fsdp_enabled == (processes > 1)
    trainer.train(resume_from_checkpoint=resume)
    student = trainer.accelerator.unwrap_model(trainer.model)
    weights = dict(student.named_parameters())
    assert all(isinstance(weight, DTensor) == (processes > 1) for weight in weights.values())
    weights = {{key: weight.full_tensor() if processes > 1 else weight for key, weight in weights.items()}}
    named = lambda log: {{k: v for k, v in log.items() if k in ("loss", "grad_norm") or k.startswith("loss/")}}
    logs = [named(log) for log in trainer.state.log_history]
    found[name] = ({{**weights, **dict(trainer.terms.projections.named_parameters())}}, logs)

teacher = causal_model()
data = rows(teacher, count=20)

def projected(**settings):
    student = causal_model(layers=2, seed=1, hidden_size=24, head_dim=6)
    settings = {{"max_steps": 4, "max_grad_norm": 0.5, **own, **settings}}
    return trainer_of({folder!r} + f"/{{processes}}", student, teacher, data, TERMS["all"], **settings)

keep("clipped", projected(optim="sgd", learning_rate=0.1))
keep("adam", projected(save_strategy="steps", save_steps=2))
keep("resumed", projected(save_strategy="steps", save_steps=2), {folder!r} + f"/{{processes}}/checkpoint-2")
for share in (1.0, 0.5):
    losses = {{"labels": {{"weight": 0.5}}, "logits": {{}}, "responses": {{"share": share, **answers}}}}
    student = talker()
    student.generation_config.eos_token_id = list(range(4, 40))  # a process has its answers before the other
    trainer = answering({folder!r} + "/r", student, talker(num_hidden_layers=3), prompts(), losses,
        optim="sgd", learning_rate=0.5, max_steps=4, logging_steps=1, **own)
    keep(f"answering {{share}}", trainer)
torch.save(found, {folder!r} + f"/{{processes}}-{{os.environ.get('RANK', '0')}}.pt")
"""
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def run(script, processes, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def script_of(folder, text):
    root, script = Path(__file__).parents[2], folder / "train.py"
    script.write_text(
        text.format(path=[str(root), str(root / "tests"), str(Path(__file__).parent)], folder=str(folder))
    )
    return script


def test_a_sharded_head_tied_or_not_and_its_layers_get_the_gradients_of_the_whole_model(tmp_path):
    assert run(script_of(tmp_path, GRADIENTS), 2).count("sharded as whole") == 2


def test_shards_are_clipped_together_with_whole_parameters():
    shard, copy = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    shard.grad, copy.grad = torch.tensor([1.0, 2.0]), torch.tensor([4.0])  # with the other process's shards: norm 3
    assert clip_with(torch.tensor(3.0), [shard], [copy], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat([shard.grad, copy.grad]), torch.tensor([0.2, 0.4, 0.8]))
    assert clip_with(torch.tensor(0.6), [shard], [copy], float("inf")).item() == pytest.approx(1.0)
    torch.testing.assert_close(copy.grad, torch.tensor([0.8]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the Trainer made in one process, and in each of two with a sharded student."""
    folder = tmp_path_factory.mktemp("sharded")
    script = script_of(folder, TRAINING)
    run(script, 1)
    run(script, 2, **FSDP2)
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name", ["clipped", "answering 1.0", "answering 0.5"])
def test_a_sharded_student_its_projections_and_its_own_answers_train_as_in_one_process(trained, name):
    (whole, logs), (sharded, sharded_logs), (other, _) = (each[name] for each in trained)
    assert whole.keys() == sharded.keys() == other.keys()
    for parameter, tensor in whole.items():
        torch.testing.assert_close(sharded[parameter], tensor, rtol=2e-4, atol=2e-5, msg=parameter)
        assert torch.equal(sharded[parameter], other[parameter]), parameter
    for one, two in zip(logs, sharded_logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    if name == "clipped":
        assert all(log["grad_norm"] > 0.5 for log in logs[:4]) and any("-" in parameter for parameter in whole)


def test_a_sharded_training_with_projections_resumes_as_if_it_had_not_stopped(trained):
    for run_of in trained:
        (unbroken, logs), (resumed, resumed_logs) = run_of["adam"], run_of["resumed"]
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())
        assert logs[2:4] == resumed_logs[2:4]
