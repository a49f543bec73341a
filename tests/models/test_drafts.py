"""Exits of language models: what is trained is what transformers drafts, and drafts change no text."""

import pytest
import torch
from builders.models import random_batch
from builders.trainers import causal_model, student_of_rows

from distill_llm import load_pretrained, with_exits
from distill_llm.architectures.lineage import LayerPlan
from distill_llm.evaluation.language_exits import token_scores
from distill_llm.measuring.drafting import Drafting, drafting, fastest
from distill_llm.models.item_logits import packed
from distill_llm.models.language_exits import DRAFTING_FAMILIES, ExitReader
from distill_llm.models.output_head import output_head

SCALED = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0},
    "mistral": {"sliding_window": 8},
}
KINDS = [
    pytest.param(kind, marks=() if kind in ("llama", "gemma2", "pruned") else pytest.mark.slow)
    for kind in (*DRAFTING_FAMILIES, "pruned")
]


def model_of(kind):
    """A language model of four layers; `pruned`: of four of six, uneven, one without attention."""
    if kind != "pruned":
        model = causal_model(kind, layers=4, **SCALED.get(kind, {}))
    else:
        sizes = [(1, (0, 1), range(40)), (2, (), range(9, 64)), (3, (0, 1), range(64)), (5, (1,), range(20))]
        plan = [LayerPlan(layer, heads, tuple(neurons)) for layer, heads, neurons in sizes]
        model = student_of_rows(causal_model(layers=6), plan)
    return with_exits(model, [1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_an_exit_says_what_the_shorter_model_says_and_drafts_by_it_change_no_text(kind):
    model = model_of(kind)
    batch = random_batch(model, batch=3, labels=False)
    positions = batch["attention_mask"].flatten().nonzero().squeeze(1)
    reader = ExitReader(model, output_head(model))
    with torch.no_grad():
        with packed(model, positions), reader.reading(positions) as read:
            model(**batch)
        for states, layers in zip(read[0].states, (1, 2, 4), strict=True):
            model.config.num_hidden_layers = layers
            expected = model(**batch, use_cache=False).logits.flatten(0, 1)[positions]
            model.config.num_hidden_layers = 4
            products = states.new_empty(len(states), 100)
            read[0].head.products(states, products)
            torch.testing.assert_close(read[0].head.finish(products, products.clone()), expected, rtol=1e-4, atol=1e-5)
    prompt = batch["input_ids"][:1, :5]
    given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
    plain = model.generate(prompt, **given)
    assert plain.shape == (1, 29)
    for layers in (1, 2):
        assert torch.equal(model.generate(prompt, **given, assistant_early_exit=layers), plain)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("kind", ["llama", "pruned"])
def test_a_folder_is_a_plain_checkpoint_that_names_its_exits(tmp_path, kind):
    model = model_of(kind)
    model.config.exits = {"after": [1, 2], "draft": 2}
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_exits.py").exists()
    found = load_pretrained(tmp_path)
    assert type(found) is type(model) and found.config.exits == {"after": [1, 2], "draft": 2}
    batch = random_batch(model, batch=2, labels=False)
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, model(**batch).logits)


def test_scores_are_those_of_the_shorter_models_at_the_labelled_tokens():
    from builders.trainers import rows
    from datasets import Dataset

    model = model_of("llama")
    data = rows(model)
    lengths = [int(row["attention_mask"].sum()) for row in data]
    columns = {name: [row[name].tolist() for row in data] for name in data[0]}
    dataset = Dataset.from_dict({**columns, "length": lengths})

    def collate(features):
        return {name: torch.tensor([each[name] for each in features]) for name in data[0]}

    found = token_scores(model, dataset, collate, batch_size=3)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labels = batch.pop("labels")[:, 1:]
    counted, said = labels != -100, {}
    with torch.no_grad():
        for layers in (4, 1, 2):
            model.config.num_hidden_layers = layers
            said[layers] = model(**batch, use_cache=False).logits[:, :-1][counted]
    model.config.num_hidden_layers = 4
    assert [score.layers for score in found] == [1, 2, 4] and found[-1].agreement == 1
    for score in found:
        loss = torch.nn.functional.cross_entropy(said[score.layers], labels[counted])
        assert score.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
        same = (said[score.layers].argmax(-1) == said[4].argmax(-1)).float().mean().item()
        assert score.agreement == pytest.approx(same) and (score.layers == 4 or same < 1)


def test_drafting_counts_what_all_layers_accept():
    model = model_of("llama")
    with torch.no_grad():  # the layers after the second add nothing: all drafts after it are right
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.generation_config.eos_token_id = None
    model.generation_config.use_cache = False  # some checkpoints say so
    model.generation_config.cache_implementation = "static"  # and this, with which transformers refuses drafts
    model.generation_config.assistant_confidence_threshold = 0.0  # a draft has as many tokens as it may
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    right, wrong = drafting(model, prompts, 20, 2), drafting(model, prompts, 20, 1)
    assert model.generation_config.cache_implementation == "static"
    assert right.same == wrong.same == 3 and right.written == wrong.written == 60
    assert right.accepted == 1 and right.tokens > 2
    assert wrong.accepted < 0.7 and 1 <= wrong.tokens < right.tokens
    assert right.seconds > 0 and right.plain > 0


def made(*times):
    return Drafting(0.5, 2.0, times, len(times), 64)


def test_the_error_of_a_speed_up_is_that_of_many_draws_of_texts():
    draw = torch.Generator().manual_seed(0)
    plain = 1 + torch.rand(4000, 40, generator=draw, dtype=torch.float64)
    drafted = plain / 1.5 + 0.3 * torch.rand(4000, 40, generator=draw, dtype=torch.float64)
    spread = (plain.sum(1) / drafted.sum(1)).std().item()
    found = [
        made(*zip(a.tolist(), b.tolist(), strict=True)).error for a, b in zip(plain[:50], drafted[:50], strict=True)
    ]
    assert sum(found) / 50 == pytest.approx(spread, rel=0.1)
    assert made((2.0, 1.0)).error == float("inf")


def test_the_exit_to_draft_with_is_not_chosen_by_noise():
    sure, noisy = made((2.0, 1.0), (4.0, 2.1), (3.0, 1.5)), made((2.0, 1.1), (4.0, 1.8), (3.0, 1.5))
    slower = made((2.0, 1.5), (4.0, 3.0), (3.0, 2.25))
    assert noisy.speedup > sure.speedup > slower.speedup > 1
    assert fastest({1: sure, 2: noisy}) == 1 and fastest({1: noisy, 2: sure}) == 1  # no further apart than chance
    assert fastest({1: slower, 2: noisy}) == 2  # surely slower
    by_chance = made((2.0, 1.2), (2.0, 2.7))  # 1.03 times as fast in all
    assert by_chance.speedup > 1 and fastest({1: by_chance}) is None
    assert fastest({1: by_chance, 3: made((2.0, 1.0), (2.0, 1.1))}) == 3
    assert fastest({1: made((2.0, 1.0))}) is None  # of a single text nothing is known
    assert fastest({1: made((1.0, 2.0), (1.0, 2.1))}) is None
