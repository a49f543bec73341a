"""Two processes train as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROCESS_CASES = [
    ("sequence-classification", 32, ["labels", "logits", "all"]),
    ("masked-lm", 24, ["labels", "hidden", "all", "labels on one rank"]),
    (
        "causal-lm",
        16,
        ["labels", "all", "labels on one rank", "logits tied", "both tied strict", "both cached", "both lora"],
    ),
]
SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
import torch
from builders.causal import causal_model as talker
from test_on_policy import repeated as prompts, trainer_of as answering
from builders.trainers import TERMS, cached, model_of, rows, trainer_of, with_lora
TERMS = TERMS | {{"both": {{"labels": {{}}, "logits": {{}}}}}}
processes = int(os.environ.get("WORLD_SIZE", 1))
found = {{}}
for head, width, names in {cases!r}:
    teacher = model_of(head, layers=4)
    for name in names:
        student = model_of(head, layers=2, seed=1, hidden=width, **({{"tie_word_embeddings": True}} if "tied" in name else {{}}))
        if "lora" in name:
            student = with_lora(student)
        data = rows(teacher, count=32 if "one rank" in name else 20)
        source = cached({folder!r} + "/cache", teacher, data, k=20) if "cached" in name else teacher
        trainer = trainer_of(
            {folder!r}, student, source, data, TERMS[name.split()[0]],
            ddp_find_unused_parameters=False if "strict" in name else None,
            max_steps=4, optim="sgd", learning_rate=0.1,
            per_device_eval_batch_size=8 if processes == 1 else 3,  # of two, the last process only repeats rows at the end
            per_device_train_batch_size=8 // processes, train_sampling_strategy="group_by_length", logging_steps=2,
        )
        if "one rank" in name:  # of each global batch the first four rows are rank 0's, the others rank 1's
            order = list(trainer._get_train_sampler())
            for start in range(4, 32, 8):
                for index in order[start : start + 4]:
                    data[index]["labels"].fill_(-100)
        assert (trainer.loss.head_terms is not None) == (head != "sequence-classification" and name != "hidden")
        seen, loss = [], trainer.loss
        trainer.loss = lambda model, batch, *rest: seen.append(int((batch["labels"] >= 0).sum())) or loss(model, batch, *rest)
        trainer.train()
        history = [log for log in trainer.state.log_history if "loss" in log]
        logs = [{{k: v for k, v in log.items() if k.startswith("loss")}} for log in history]
        trainer.loss = loss
        logs[-1]["eval_loss"] = trainer.evaluate()["eval_loss"]
        weights = {{**student.state_dict(), **trainer.terms.projections.state_dict(prefix="projection.")}}
        found[head + " " + name] = (weights, logs, seen)
for share in (1.0, 0.5):
    student = talker()
    student.generation_config.eos_token_id = list(range(4, 70))  # answers of uneven length
    losses = {{"labels": {{}}, "logits": {{}}, "responses": {{"share": share, "max_new_tokens": 6}}}}
    trainer = answering(
        {folder!r}, student, talker(num_hidden_layers=3), prompts(), losses, optim="sgd", learning_rate=0.5,
        max_steps=4, per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, logging_steps=2,
    )
    seen, loss = [], trainer.loss
    trainer.loss = lambda model, batch, *rest: seen.append(int((batch["labels"] >= 0).sum())) or loss(model, batch, *rest)
    trainer.train()
    logs = [{{k: v for k, v in log.items() if k.startswith("loss")}} for log in trainer.state.log_history if "loss" in log]
    found[f"answers {{share}}"] = (student.state_dict(), logs, seen)
rank = os.environ.get("RANK", "0")
torch.save(found, {folder!r} + f"/{{processes}}-{{rank}}.pt")
"""


@pytest.fixture(scope="module")
def runs_of_one_and_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    root, script = Path(__file__).parents[2], folder / "train.py"
    path = [str(root), str(root / "tests"), str(Path(__file__).parent)]
    script.write_text(SCRIPT.format(cases=PROCESS_CASES, path=path, folder=str(folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], launcher):
        done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("head, name", [(head, name) for head, _, names in PROCESS_CASES for name in names])
def test_two_processes_train_as_one_on_the_same_global_batches(runs_of_one_and_two_processes, head, name):
    (one, one_logs, _), (two, two_logs, seen), (other, _, other_seen) = (
        run[f"{head} {name}"] for run in runs_of_one_and_two_processes
    )
    assert one.keys() == two.keys() == other.keys()
    for parameter, tensor in one.items():
        torch.testing.assert_close(two[parameter], tensor, rtol=2e-4, atol=2e-5, msg=parameter)
        assert torch.equal(two[parameter], other[parameter]), parameter
    assert len(one_logs) == 2
    for a, b in zip(one_logs, two_logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4), json.dumps([a, b])
    assert len(seen) == len(other_seen) == 4 and all(seen)
    assert any(other_seen) == ("one rank" not in name)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_two_processes_learn_from_their_students_answers_as_one(runs_of_one_and_two_processes, share):
    (one, one_logs, all_seen), (two, two_logs, seen), (other, _, other_seen) = (
        run[f"answers {share}"] for run in runs_of_one_and_two_processes
    )
    assert sum(all_seen) == sum(seen) + sum(other_seen) and sum(seen) != sum(other_seen)
    for parameter, tensor in one.items():
        torch.testing.assert_close(two[parameter], tensor, rtol=2e-4, atol=2e-5, msg=parameter)
        assert torch.equal(two[parameter], other[parameter]), parameter
    assert len(one_logs) == len(two_logs) == 2
    for a, b in zip(one_logs, two_logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
