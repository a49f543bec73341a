"""Which single weights go: exact numbers in every scope and group, and each criterion by hand."""

import itertools

import pytest
import torch
from builders.families import family_batch, family_model
from builders.models import random_batch, tiny_model

from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite
from distill_llm.models.masks import Masks, linears_of, masks_in, sparsity_of
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.weights.choosing import lowest, lowest_of_groups, lowest_of_rows, removed
from distill_llm.pruning.weights.inputs import collect_inputs
from distill_llm.pruning.weights.rules import SparsityRules
from distill_llm.pruning.weights.sparsify import sparsify

EXACT = CalibrationSettings(exact=True)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_exactly_the_lowest_go_in_matrices_rows_and_over_all():
    scores = {"a": torch.tensor([[5.0, 1, 3, 9], [2, 8, 7, 6]]), "b": torch.tensor([[0.5, 4, 0.1, 10]])}
    goes = {scope: removed(scores, 0.5, scope) for scope in ("row", "matrix", "global")}
    assert goes["row"]["a"].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert goes["matrix"]["a"].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert goes["global"]["a"].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
    assert goes["global"]["b"].int().tolist() == [[1, 1, 1, 0]]


def test_of_equal_scores_the_first_go_and_no_more_than_asked():
    assert lowest(torch.ones(2, 4), 3).int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert lowest_of_rows(torch.zeros(2, 4), 1).int().tolist() == [[1, 0, 0, 0]] * 2


@pytest.mark.parametrize("kept, size", [(2, 4), (4, 8), (1, 4)])
def test_of_every_group_the_best_stay_by_brute_force(kept, size):
    scores = drawn(6, 16).abs()
    goes = lowest_of_groups(scores, size - kept, size)
    for row, begin in itertools.product(range(6), range(0, 16, size)):
        group = scores[row, begin : begin + size]
        best = max(itertools.combinations(range(size), kept), key=lambda each: group[list(each)].sum())
        assert [i for i in range(size) if not goes[row, begin + i]] == list(best)


def test_counts_over_all_linears_are_exact():
    model = tiny_model(hidden=24, intermediate=40)
    total = sum(module.weight.numel() for module in linears_of(model).values())
    _, masks = sparsify(model, rules=SparsityRules(0.37, criterion="magnitude", scope="global"))
    assert (masks.weights, masks.zeros) == (total, round(0.37 * total))


def test_embeddings_norms_biases_and_heads_are_whole_and_the_model_is_unchanged():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse, masks = sparsify(model, rules=SparsityRules(0.5, criterion="magnitude"))
    assert len(masks.kept) == 3 * 6 == sum(name.endswith(("query", "key", "value", "dense")) for name in masks.kept)
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name])
        linear = name.removesuffix(".weight")
        expected = before[name] * masks.kept[linear] if linear in masks.kept else before[name]
        assert torch.equal(tensor, expected), name
    assert sparsity_of(sparse) == masks.sparsity == 0.5 and sparsity_of(model) == 0


def inputs_by_hand(model, batches):
    """Of every linear the valid tokens that enter it, (tokens, I)."""
    seen, handles = {name: [] for name in linears_of(model)}, []
    for name, module in linears_of(model).items():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: seen[name].append(a[0])))
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return {name: torch.cat([x[mask] for x, mask in zip(each, masks, strict=True)]) for name, each in seen.items()}


def test_wanda_by_hand():
    model = tiny_model()
    batches = [random_batch(model, seed=seed) for seed in range(3)]
    _, masks = sparsify(model, batches, SparsityRules(0.5, criterion="wanda"), settings=EXACT)
    with torch.no_grad():
        inputs = inputs_by_hand(model, batches)
    for name, module in linears_of(model).items():
        scores = module.weight.abs() * inputs[name].norm(dim=0)
        for row, kept in zip(scores, masks.kept[name], strict=True):
            assert kept.sum() == len(row) // 2
            assert row[kept].min() >= row[~kept].max()


@pytest.mark.parametrize("family", ["deberta-v2", "deberta-v3"])
def test_linears_that_read_no_tokens_count_all_that_they_read(family):
    """Of DeBERTa's embeddings of distances every row, once for each batch; shared projections read tokens as well."""
    model = family_model(family)
    batches = [family_batch(model, seed=seed) for seed in range(2)]
    names, seen = [name for name in linears_of(model) if "layer.1.attention.self." in name], {}

    def see(name, mask):
        def hook(module, args):
            tokens = args[0].shape[:2] == mask.shape
            seen.setdefault(name, []).append(args[0][mask] if tokens else args[0].flatten(0, 1))

        return hook

    with torch.no_grad():
        for batch in batches:
            hooks = [
                model.get_submodule(n).register_forward_pre_hook(see(n, batch["attention_mask"].bool())) for n in names
            ]
            model(**batch)
            for hook in hooks:
                hook.remove()
    norms = collect_inputs(model, batches, "norms", EXACT, names=names)
    moments = collect_inputs(model, batches, "moments", EXACT, names=names)
    assert norms.keys() == moments.keys() == set(names)
    for name in names:
        rows = torch.cat(seen[name])
        torch.testing.assert_close(norms[name], rows.norm(dim=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments[name], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    _, masks = sparsify(model, batches, SparsityRules(pattern="2:4", criterion="wanda"))
    assert masks.sparsity == 0.5 and masks.kept.keys() == linears_of(model).keys()
    with pytest.raises(InputError, match="criterion: got 'taylor'; choose another: .* distances"):
        sparsify(model, batches, SparsityRules(0.5, criterion="taylor"))


def test_wanda_of_layers_at_a_time_sees_the_inputs_that_sparse_layers_give():
    model = tiny_model()
    batches = [random_batch(model, seed=seed) for seed in range(3)]
    rules = SparsityRules(0.5, criterion="wanda")
    sparse, masks = sparsify(model, batches, rules, layers_at_once=1, settings=EXACT)
    with torch.no_grad():
        inputs, dense = inputs_by_hand(sparse, batches), inputs_by_hand(model, batches)
    last = "bert.encoder.layer.2.attention.self.query"  # it reads what the layers before it give
    weight = model.get_submodule(last).weight.abs()
    wanted, other = (lowest_of_rows(weight * each[last].norm(dim=0), 16) for each in (inputs, dense))
    assert torch.equal(~masks.kept[last], wanted) and not torch.equal(wanted, other)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_inputs_that_are_not_finite_are_refused_in_a_line(criterion):
    model = tiny_model()
    layer = model.bert.encoder.layer[0].intermediate
    layer.register_forward_hook(lambda module, args, output: output * float("inf"))
    with pytest.raises(NotFinite, match="an input of bert.encoder.layer.0.output.dense is "):
        sparsify(model, [random_batch(model)], SparsityRules(0.5, criterion=criterion))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_gradient_times_weight_is_the_mean_over_examples_of_the_effect_of_a_mask(family):
    model = tiny_model() if family == "bert" else family_model(family)
    batch = random_batch(model, batch=3)
    if family != "bert":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    _, masks = sparsify(model, [batch], SparsityRules(0.5, criterion="taylor", scope="matrix"), settings=EXACT)
    effect = {name: torch.zeros_like(module.weight) for name, module in linears_of(model).items()}
    for i in range(3):
        model.zero_grad()
        one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        labels = (one["labels"][:, 1:] != -100).sum() if family != "bert" else 1
        (model(**one).loss * labels).backward()
        for name, module in linears_of(model).items():
            effect[name] += (module.weight * module.weight.grad).abs().detach()
    for name, scores in effect.items():
        kept = masks.kept[name]
        assert kept.shape == scores.shape and kept.sum() == kept.numel() - round(kept.numel() / 2)
        assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-3), name


def test_zeros_of_an_earlier_round_stay_and_more_come():
    model = tiny_model()
    batches = [random_batch(model)]
    for criterion, pattern in itertools.product(("magnitude", "wanda", "sparsegpt"), ("unstructured", "2:4", "4:8")):
        # In blocks of 8 columns, those before a block have changed its weights, zeros as well, when it is chosen from.
        rules = SparsityRules(0.5, pattern, criterion, block=8)
        half, first = sparsify(model, batches, rules, progress=0.5)
        _, second = sparsify(half, batches, rules)
        assert first.sparsity == pytest.approx(0.25) and second.sparsity == pytest.approx(0.5)
        assert not any((second.kept[name] & ~mask).any() for name, mask in first.kept.items()), (criterion, pattern)


def test_weights_that_are_zero_go_before_those_of_inputs_that_are_always_zero():
    """Both are worth nothing to wanda, but what was removed before must stay so."""
    model = tiny_model()
    linear = model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        linear.weight[:, 40] = 0.0
    model.bert.encoder.layer[0].intermediate.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.arange(20), 0.0)
    )
    _, masks = sparsify(model, [random_batch(model)], SparsityRules(10 / 64, criterion="wanda"))
    kept = masks.kept["bert.encoder.layer.0.output.dense"]
    assert not kept[:, 40].any() and (kept.sum(1) == 54).all() and kept[:, 20:40].all()


def test_masks_are_packed_eight_to_a_byte_and_read_back(tmp_path):
    model = tiny_model(hidden=20, intermediate=12)
    _, masks = sparsify(model, rules=SparsityRules(0.3, criterion="magnitude"))
    masks.save(tmp_path / "masks.safetensors")
    bytes_of_bits = sum(-(-mask.numel() // 8) for mask in masks.kept.values())
    assert bytes_of_bits < (tmp_path / "masks.safetensors").stat().st_size < bytes_of_bits + 8000
    found = masks_in(tmp_path)
    assert (found.pattern, found.criterion, found.zeros) == ("unstructured", "magnitude", masks.zeros)
    assert all(torch.equal(found.kept[name], mask) for name, mask in masks.kept.items())
    assert masks_in(tmp_path / "elsewhere") is None and masks_in(None) is None


def test_files_and_masks_that_do_not_fit_are_refused_in_a_line(tmp_path):
    (tmp_path / "masks.safetensors").write_text("no")
    with pytest.raises(InputError, match="^masks: got "):
        masks_in(tmp_path)
    _, masks = sparsify(tiny_model(), rules=SparsityRules(0.3, criterion="magnitude"))
    with pytest.raises(InputError, match="masks of this model"):
        masks.apply(tiny_model(hidden=16))
    with pytest.raises(InputError, match="masks of this model"):
        Masks({"nothing": torch.ones(2, 2, dtype=torch.bool)}).check(tiny_model())


@pytest.mark.parametrize(
    "given, said",
    [
        ({"sparsity": 1.0}, "sparsity: got 1.0"),
        ({}, "sparsity: not given"),
        ({"pattern": "4:2"}, "pattern: got '4:2'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "set it to 0.5"),
        ({"pattern": "2:4", "scope": "row"}, "compete within a group"),
        ({"sparsity": 0.5, "criterion": "wander"}, "wanda"),
        ({"sparsity": 0.5, "criterion": "sparsegpt", "scope": "global"}, "within blocks"),
    ],
)
def test_rules_that_mean_nothing_are_refused(given, said):
    with pytest.raises(InputError) as error:
        SparsityRules(**given)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_groups_run_along_the_inputs_of_transposed_linears_too():
    """GPT-2's weights are (inputs, outputs)."""
    model = family_model("gpt2")
    _, masks = sparsify(model, rules=SparsityRules(pattern="2:4", criterion="magnitude"))
    for name, mask in masks.kept.items():
        weight = linears_of(model)[name].weight.detach().abs()
        groups, kept = weight.unflatten(0, (-1, 4)), mask.unflatten(0, (-1, 4))
        assert torch.equal(kept, groups >= groups.sort(dim=1).values[:, 2:3]), name


def test_inputs_that_groups_do_not_divide_are_refused():
    with pytest.raises(InputError, match="pattern: got '2:4'; accepted: M that divides"):
        sparsify(tiny_model(intermediate=30), rules=SparsityRules(pattern="2:4", criterion="magnitude"))


def test_the_scope_global_needs_all_layers_at_once():
    with pytest.raises(InputError, match="layers_at_once"):
        sparsify(tiny_model(), rules=SparsityRules(0.5, "unstructured", "taylor"), layers_at_once=1)
