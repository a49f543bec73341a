"""Perplexity of causal language models against whole logits, and responses against a loop of one token at a time."""

import math
from functools import partial

import pytest
import torch
from builders.causal import EOS, causal_model, data_of, word_tokenizer, words
from torch.nn.functional import log_softmax
from transformers import GenerationConfig, PreTrainedModel

from distill_llm.common.finite import NotFinite
from distill_llm.data import TaskData, collator, encode
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.data.kinds.prompts import prompts
from distill_llm.evaluation import evaluate_model, perplexity
from distill_llm.losses.chunked_head import head_losses

FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64},
}


def documents() -> TaskData:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(2, 12, (20,), generator=draw).tolist()
    texts = [words(*torch.randint(0, 90, (size,), generator=draw).tolist()) for size in sizes]
    return data_of(causal_lm("text", "text"), text=texts)


def questions(metric: str = "perplexity", packing: bool = False, max_new_tokens: int = 5) -> TaskData:
    draw = torch.Generator().manual_seed(2)
    columns = {
        name: [
            words(*torch.randint(0, 90, (size,), generator=draw).tolist())
            for size in torch.randint(1, 7, (12,), generator=draw).tolist()
        ]
        for name in ("prompt", "response")
    }
    return data_of(prompts(metric=metric, packing=packing, max_new_tokens=max_new_tokens), **columns)


def brute_force(model: PreTrainedModel, rows) -> float:
    """Mean of -log p(token | tokens before it) over labelled tokens, from whole logits of single rows."""
    values = []
    with torch.no_grad():
        for row in rows:
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            for place in range(1, len(row["labels"])):
                if row["labels"][place] != -100:
                    values.append(-log_softmax(logits[place - 1], -1)[row["labels"][place]].item())
    return sum(values) / len(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_whole_logits_of_single_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "head_losses", partial(head_losses, chunk=7))
    model, data = causal_model(family, **FAMILIES[family]).train(), documents()
    tokenizer = word_tokenizer()
    encoded = encode(data, tokenizer, 10)
    assert len(set(encoded.test["length"])) > 1
    make = collator(data.task, tokenizer)
    got = evaluate_model(model, encoded.test, data.task, make, batch_size=8, progress=False)
    assert model.training
    wanted = brute_force(model, encoded.test)
    assert got["loss"] == pytest.approx(wanted, rel=1e-5)
    assert got["perplexity"] == got["score"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert got.keys() == {"loss", "perplexity", "score", "standard_error", "rows"}


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_perplexity_of_prompts_is_over_responses_and_the_same_in_packed_rows(batch_size: int) -> None:
    model, tokenizer = causal_model(), word_tokenizer()
    plain, packed = encode(questions(), tokenizer, 16), encode(questions(packing=True), tokenizer, 32)
    assert len(packed.train) < len(plain.train) / 2
    wanted = brute_force(model, plain.train)
    for data in (plain, packed):
        make = collator(data.task, tokenizer)
        got = evaluate_model(model, data.train, data.task, make, batch_size=batch_size, progress=False)
        assert got["loss"] == pytest.approx(wanted, rel=1e-5)


def greedy(model: PreTrainedModel, ids: list[int], steps: int) -> list[int]:
    """One token at a time, without a cache, until EOS."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < steps and EOS not in new:
            new.append(int(model.eval()(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return [token for token in new if token != EOS]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_exact_match_is_that_of_greedy_decoding_one_by_one(family: str, batch_size: int) -> None:
    model, tokenizer = causal_model(family), word_tokenizer()
    model.generation_config = own = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, min_length=9
    )
    data = questions("exact_match")
    answers = [greedy(model, tokenizer(text)["input_ids"], 5) for text in data.test["prompt"]]
    half = [tokenizer.decode(a) if i % 2 else words(3) for i, a in enumerate(answers)]
    data = data_of(data.task, prompt=data.test["prompt"][:], response=half)
    encoded = encode(data, tokenizer, 16)
    make = collator(data.task, tokenizer)
    got = evaluate_model(model, encoded.test, data.task, make, batch_size=batch_size, progress=False)
    assert got["exact_match"] == got["score"] == pytest.approx(0.5)
    assert got["loss"] == pytest.approx(brute_force(model, encoded.test), rel=1e-5)
    assert model.generation_config is own and own.do_sample


def test_generation_ends_at_eos_whatever_follows() -> None:
    model, tokenizer = causal_model(), word_tokenizer()
    data = questions("exact_match", max_new_tokens=20)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2  # ends come at different places
    answers = [greedy(model, tokenizer(text)["input_ids"], 20) for text in data.test["prompt"]]
    ended = [len(answer) < 20 for answer in answers]
    data = data_of(data.task, prompt=data.test["prompt"][:], response=[tokenizer.decode(a) for a in answers])
    make = collator(data.task, tokenizer)
    encoded = encode(data, tokenizer, 64)
    got = evaluate_model(model, encoded.test, data.task, make, batch_size=12, progress=False)
    assert got["exact_match"] == 1.0 and 0 < sum(ended) < len(ended)


def test_a_model_whose_loss_is_not_finite_is_refused() -> None:
    model, data = causal_model(), documents()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    make = collator(data.task, word_tokenizer())
    with pytest.raises(NotFinite, match="^the (output|loss) of .* in scoring is nan; score a model"):
        evaluate_model(model, encode(data, word_tokenizer(), 10).test, data.task, make, progress=False)
