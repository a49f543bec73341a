"""How near `distill-llm estimate` comes to training: bytes by torch's profiler, and seconds, of small models on the CPU.

Usage: estimates.py [NAME ...]   (default: all of MODELS); prints one JSON line for each model.

The rate is measured by one step of the same models before the training, as the command does it. Bytes are the most that
torch's allocator held at once from the making of the trainer to the end of a training of three steps; seconds are those of
the processor in the whole of `train()` with twenty, without the profiler, with one thread (OMP_NUM_THREADS=1).
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from distill_llm import DistillationConfig, DistillationTrainer
from distill_llm.pipeline.estimate import Estimate
from distill_llm.pipeline.prices import Devices, Models, Rows
from distill_llm.pipeline.work import measured_rate
from distill_llm.recipe.recipe import parse_recipe

PROFILED, TIMED, TOKENS, PAIRS = 3, 20, 64, 3


def bert(width, layers, neurons):
    return BertForSequenceClassification, BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32, intermediate_size=neurons
    )


def llama(width, layers, neurons, vocabulary):
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        intermediate_size=neurons,
        dtype=torch.float32,
    )


LOGITS = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}
MODELS = {
    # teacher, student, losses, rows of a micro-batch, micro-batches of a step, further fields of training
    "bert-22m": (bert(384, 6, 1536), bert(384, 3, 1536), LOGITS, 8, 1, {}),
    "bert-22m-hidden": (bert(384, 6, 1536), bert(384, 3, 1536), {**LOGITS, "hidden": {"layers": "uniform"}}, 4, 2, {}),
    "llama-20m": (llama(384, 6, 1024, 16000), llama(384, 3, 1024, 16000), LOGITS, 8, 1, {}),
    "llama-50m": (llama(512, 12, 1408, 16000), llama(512, 6, 1408, 16000), LOGITS, 4, 1, {}),
    "llama-20m-recomputed": (
        llama(384, 6, 1024, 16000),
        llama(384, 3, 1024, 16000),
        LOGITS,
        4,
        2,
        {"activation_checkpointing": True},
    ),
}


def trainer_of(name, folder, steps):
    """A trainer on random rows of full length."""
    (kind, teacher), (_, student), losses, rows, accumulated, fields = MODELS[name]
    torch.manual_seed(0)
    ids = torch.randint(5, 16000, (rows * accumulated * steps, TOKENS))
    labels = ids if kind is LlamaForCausalLM else ids[:, 0] % 2
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]
    args = DistillationConfig(
        output_dir=str(folder),
        losses=losses,
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **fields,
    )
    return DistillationTrainer(model=kind(student), teacher=kind(teacher).eval(), args=args, train_dataset=data)


def processor_seconds(work, device=None):
    """Seconds of the processor, which other processes on the machine do not change much."""
    start = time.process_time()
    work()
    return time.process_time() - start


def allocated(work):
    """The most bytes that torch's allocator held at once while `work` ran."""
    gc.collect()  # what goes while it is profiled would count as never held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = work()
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return peak


def on_paper(name):
    """Bytes of the recovery stage, and its operations; and the rate of its step."""
    (kind, teacher), (_, student), losses, rows, accumulated, fields = MODELS[name]
    training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated, **fields}
    recipe = parse_recipe(
        {
            "teacher": {"model": "teacher"},
            "student": {"model": "student"},
            "data": {"task": "text", "path": "text"},
            "distillation": {"losses": losses, "max_steps": TIMED, **training},
        }
    )
    with torch.device("meta"):
        models = Models(kind(teacher), kind(student))
    count = rows * accumulated * TIMED
    made = Estimate(recipe, models, Rows(count, 1, TOKENS, TOKENS, TOKENS), Devices(1, 10**10), gpu=False)
    stage = next(stage for stage in made.stages() if "recover" in stage.name)
    return stage, measured_rate(*made.trial(), torch.device("cpu"), processor_seconds)


def run(name):
    with tempfile.TemporaryDirectory() as folder:
        peak = allocated(lambda: (trainer := trainer_of(name, Path(folder), PROFILED), trainer.train()))
        rates, times = [], []
        for _ in range(PAIRS):  # in turns: the machine is not ours alone
            stage, rate = on_paper(name)
            trainer = trainer_of(name, Path(folder), TIMED)
            times.append(processor_seconds(trainer.train))
            rates.append(rate)
    pairs = [stage.flops / rate / seconds for rate, seconds in zip(rates, times, strict=True)]
    found = {"model": name, "estimated_mb": stage.bytes / 1e6, "measured_mb": peak / 1e6, "memory": stage.bytes / peak}
    found |= {"gflops_per_s": statistics.median(rates) / 1e9, "seconds": statistics.median(times)}
    found |= {"time": statistics.median(pairs), "time_min": min(pairs), "time_max": max(pairs)}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


if __name__ == "__main__":
    for each in sys.argv[1:] or MODELS:
        print(json.dumps(run(each)), flush=True)
