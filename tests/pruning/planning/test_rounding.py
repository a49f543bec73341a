"""Plans whose neurons stay in coarse steps, against every pair of numbers that the steps allow."""

import pytest
from builders.pruning import random_scores
from transformers import BertConfig, BertModel

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.units.sizes import counts_of

STEPS = (1, 7, 16, 24, 40, 96)
KEEPS = (0.9, 0.7, 0.5, 0.3, 0.2)


def bert(layers: int = 3, hidden: int = 24, heads: int = 6, neurons: int = 96) -> BertModel:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": neurons}
    return BertModel(BertConfig(vocab_size=16, max_position_embeddings=8, num_hidden_layers=layers, **sizes)).eval()


def layer_weights(heads: int, neurons: int, hidden: int = 24, size: int = 4) -> int:
    """Weights and biases of a BERT layer, by hand: four linears of the attention, two of the FFN, two norms."""
    channels = heads * size
    attention = 3 * (hidden * channels + channels) + channels * hidden + hidden
    return attention + hidden * neurons + neurons + neurons * hidden + hidden + 4 * hidden


def evenness(heads: int, neurons: int, share: float) -> float:
    return abs(heads / 6 - share) + abs(neurons / 96 - share)


def common_share(budget: float) -> float:
    return (budget - layer_weights(0, 0)) / (layer_weights(6, 96) - layer_weights(0, 0))


@pytest.fixture(scope="module")
def small():
    model = bert()
    return model, random_scores(counts_of(model))


@pytest.mark.parametrize("step", STEPS)
def test_uniform_plans_take_the_most_even_of_the_pairs_nearest_to_the_budget(small, step):
    model, scores = small
    for keep in KEEPS:
        budget = keep * layer_weights(6, 96)
        every = [(h, n) for h in range(1, 7) for n in range(0, 97, step) if layer_weights(h, n) <= budget]
        most = max(layer_weights(*pair) for pair in every)
        floor = 0.99 * (budget if most >= 0.99 * budget else most)
        # Beside the same heads, more neurons are nearer.
        full = [max(pair for pair in every if pair[0] == h) for h in {h for h, _ in every}]
        share = common_share(budget)
        least = min(evenness(*pair, share) for pair in full if layer_weights(*pair) >= floor)
        plan = plan_pruning(model, scores, keep, uniform=True, round_to=step)
        (found,) = {(len(row.heads), len(row.neurons)) for row in plan.layers}
        assert found in every and layer_weights(*found) >= floor, (keep, found)
        assert evenness(*found, share) == pytest.approx(least), (keep, found)
        assert plan.kept == pytest.approx(layer_weights(*found) / layer_weights(6, 96))


@pytest.mark.parametrize("step", STEPS)
def test_local_plans_are_as_near_and_no_layer_is_more_than_a_step_ahead(small, step):
    model, scores = small
    for keep in KEEPS:
        budget = 3 * keep * layer_weights(6, 96)
        totals = [
            sum(layer_weights(h, step * blocks) for blocks in (b + (i < more) for i in range(3)))
            for h in range(1, 7)
            for b in range(96 // step)
            for more in range(4)
        ]
        best = max(total for total in totals if total <= budget)
        floor = 0.99 * (budget if best >= 0.99 * budget else best)
        plan = plan_pruning(model, scores, keep, scope="local", round_to=step)
        heads, neurons = [len(row.heads) for row in plan.layers], [len(row.neurons) for row in plan.layers]
        assert floor <= sum(map(layer_weights, heads, neurons)) <= budget, (keep, heads, neurons)
        assert len(set(heads)) == 1 and max(neurons) - min(neurons) <= step
        assert all(count % step == 0 for count in neurons)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_global_plans_leave_no_room_for_a_head(small, step, criterion):
    model, _ = small
    scores, head = random_scores(counts_of(model), criterion), layer_weights(1, 0) - layer_weights(0, 0)
    for keep in KEEPS:
        plan = plan_pruning(model, scores, keep, round_to=step)
        left = sum(layer_weights(len(row.heads), len(row.neurons)) for row in plan.layers)
        budget = 3 * keep * layer_weights(6, 96)
        assert left <= budget and all(len(row.neurons) % step == 0 for row in plan.layers)
        whole = all(len(row.heads) == 6 for row in plan.layers)
        assert whole or budget - left < head, (keep, plan.kept)


@pytest.mark.parametrize(("step", "numbers"), [(128, (5, 768)), (256, (5, 768))])
def test_heads_that_round_down_with_the_neurons_come_back_at_the_size_of_minilm(step, numbers):
    model = bert(6, 384, 12, 1536)
    plan = plan_pruning(model, random_scores(counts_of(model)), 0.5, uniform=True, round_to=step)
    assert {(len(row.heads), len(row.neurons)) for row in plan.layers} == {numbers}
    assert plan.kept == pytest.approx(0.473, abs=5e-4)
    assert (
        plan.note == f"kept {plan.kept:.4f} of the layers' parameters instead of 0.5: these units come in larger steps"
    )


@pytest.mark.parametrize("options", [{}, {"scope": "local"}, {"uniform": True}], ids=str)
def test_a_step_wider_than_a_layer_is_refused(small, options):
    model, scores = small
    with pytest.raises(InputError, match="^round_to: got 97; accepted: at most 96, the FFN neurons of layer 0$"):
        plan_pruning(model, scores, 0.5, round_to=97, **options)
    rows = tuple(LayerPlan(i, range(6), range(neurons)) for i, neurons in enumerate((96, 0, 10)))
    uneven = prune(model, PruningPlan("bert", rows))
    with pytest.raises(InputError, match="^round_to: got 16; accepted: at most 10, the FFN neurons of layer 2$"):
        plan_pruning(uneven, random_scores(counts_of(uneven)), 0.5, round_to=16, **options)


def test_a_step_wider_than_the_residual_stream_is_refused(small):
    model, scores = small
    with pytest.raises(InputError, match="^round_to: got 25; accepted: at most 24, the channels of the residual"):
        plan_pruning(model, scores, 0.5, units=("heads", "hidden"), round_to=25)
