"""What each term of the objective is, in the trainer's log: against computations from the models' own outputs."""

import copy

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import (
    NO_DROPOUT,
    causal_model,
    model_of,
    rows,
    step_gradient,
    student_of_rows,
    trainer_of,
)

from distill_llm.architectures.lineage import LayerPlan
from distill_llm.common.errors import InputError
from distill_llm.losses.schedules import Schedule


def stacked(data, *names):
    return {name: torch.stack([row[name] for row in data]) for name in names or data[0]}


def outputs_of(model, paths, batch):
    """What modules of an eager copy of a model put out, by path."""
    plain, found = copy.deepcopy(model).eval(), {}
    plain.set_attn_implementation("eager")
    for path in paths:
        hook = lambda module, args, output, path=path: found.update({path: output})  # noqa: E731
        plain.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        plain(**batch)
    return [found[path] for path in paths]


@pytest.mark.parametrize(
    "pairs, field", [(["qq", "kk", "vv"], None), (["vv"], None), ("last", [1, 3]), ("uniform", [0, 1])]
)
def test_relations_of_models_of_other_widths_equal_those_of_the_projections_of_eager_models(tmp_path, pairs, field):
    teacher = tiny_model(layers=4, **NO_DROPOUT)
    student = tiny_model(layers=2, hidden=24, heads=3, seed=1, **NO_DROPOUT)
    data, heads = rows(teacher), 8
    settings = (
        {"pairs": pairs, "heads": heads} if field is None else {"layers": pairs}
    )  # 8 is the most that fit 24 and 32
    _, log = step_gradient(tmp_path, student, teacher, data, {"relations": settings})
    batch = stacked(data, "input_ids", "attention_mask")
    kinds = {"q": "query", "k": "key", "v": "value"}
    chosen = [kinds[pair[0]] for pair in pairs] if field is None else list(kinds.values())
    layer_pairs = [(0, 1), (1, 3)] if pairs == "uniform" else [(1, 3)]
    total, count = 0.0, int(batch["attention_mask"].sum())
    for layer, source in layer_pairs:
        for name in chosen:
            path = "bert.encoder.layer.{}.attention.self." + name
            (q,), (p,) = (
                outputs_of(model, [path.format(index)], batch) for model, index in ((student, layer), (teacher, source))
            )
            for example, mask in enumerate(batch["attention_mask"].bool()):
                maps = []
                for each in (q, p):
                    parts = each[example][mask].chunk(heads, dim=-1)
                    maps.append(torch.stack([(x @ x.T / x.shape[1] ** 0.5).softmax(-1) for x in parts]))
                total = total + (maps[1] * (maps[1] / maps[0]).log()).sum() / heads / len(layer_pairs)
    assert log["loss/relations"] == pytest.approx(float(total) / count, rel=1e-4)


@pytest.mark.parametrize("distance", ["mse", "cosine", "normalized_mse"])
def test_the_embeddings_term_compares_what_the_first_layers_read(tmp_path, distance):
    teacher, student = (
        tiny_model("electra", layers=4, **NO_DROPOUT),
        tiny_model("electra", layers=2, seed=1, **NO_DROPOUT),
    )
    data = rows(teacher)
    _, log = step_gradient(tmp_path, student, teacher, data, {"embeddings": {"distance": distance}})
    batch = stacked(data, "input_ids", "attention_mask")
    own, target = (
        model(**batch, output_hidden_states=True).hidden_states[0][batch["attention_mask"].bool()]
        for model in (student, teacher)
    )
    expected = {
        "mse": (own - target).square().mean(),
        "cosine": 1 - torch.nn.functional.cosine_similarity(own, target, dim=-1).mean(),
        "normalized_mse": ((own - target).square().sum(-1) / target.square().sum(-1)).mean(),
    }[distance]
    assert log["loss/embeddings"] == pytest.approx(expected.item(), rel=1e-5)


def test_embeddings_of_another_width_are_projected_and_their_projection_learns(tmp_path):
    teacher, student = causal_model(layers=4), causal_model(layers=2, seed=1, hidden_size=24)
    found, _ = step_gradient(
        tmp_path, student, teacher, rows(teacher), {"embeddings": {}, "hidden": {"layers": "last"}}
    )
    projections = {name: tuple(found[name].shape) for name in found if name.startswith("projection")}
    assert projections == {"projection embeddings.weight": (32, 24), "projection 1-3.weight": (32, 24)}
    assert all(found[name].abs().sum() > 0 for name in projections)


def test_projections_are_drawn_in_the_order_in_which_checkpoints_hold_them(tmp_path):
    teacher, student = causal_model(layers=4), causal_model(layers=2, seed=1, hidden_size=24)
    losses = {"embeddings": {}, "hidden": {"layers": "uniform"}}
    projections = trainer_of(tmp_path, student, teacher, [], losses, seed=5).terms.projections
    assert list(projections) == ["0-1", "1-3", "embeddings"]
    generator = torch.Generator().manual_seed(5)
    for linear in projections.values():
        drawn = torch.empty(32, 24).normal_(0, 24**-0.5, generator=generator)
        torch.testing.assert_close(linear.weight.detach(), drawn, rtol=0, atol=0)


def test_a_student_that_keeps_known_channels_is_compared_with_these_and_needs_no_projection(tmp_path):
    teacher = causal_model(layers=4)
    kept = (*range(0, 32, 2), 31)
    student = student_of_rows(teacher, [LayerPlan(i, (0, 1), tuple(range(64))) for i in (1, 3)], hidden=kept)
    data = rows(teacher)
    found, log = step_gradient(tmp_path, student, teacher, data, {"hidden": {"layers": "uniform"}, "embeddings": {}})
    assert not any(name.startswith("projection") for name in found)
    batch = stacked(data, "input_ids", "attention_mask")
    valid = batch["attention_mask"].bool()
    states = [
        outputs_of(model, ["model.embed_tokens", *(f"model.layers.{index}" for index in layers)], batch)
        for model, layers in ((student, (0, 1)), (teacher, (1, 3)))
    ]
    distances = [(own - target[..., kept])[valid].square().mean().item() for own, target in zip(*states, strict=True)]
    assert log["loss/embeddings"] == pytest.approx(distances[0], rel=1e-5)
    assert log["loss/hidden"] == pytest.approx(sum(distances[1:]) / 2, rel=1e-5)


def test_a_pruned_student_of_another_model_than_its_teacher_is_projected_as_any_student_of_another_width(tmp_path):
    original, teacher = causal_model(layers=4), causal_model(layers=6, hidden_size=64, seed=1)
    lineage = [LayerPlan(i, (0, 1), tuple(range(64))) for i in (1, 3)]
    student = student_of_rows(original, lineage, hidden=tuple(range(0, 32, 2)))
    data, losses = rows(teacher), {"hidden": {"layers": "uniform"}, "embeddings": {}}
    trainer = trainer_of(tmp_path, student, teacher, data, losses, learning_rate=0.0)
    trainer.train()
    batch = stacked(data, "input_ids", "attention_mask")
    valid = batch["attention_mask"].bool()
    own, target = (
        outputs_of(model, ["model.embed_tokens", *(f"model.layers.{index}" for index in layers)], batch)
        for model, layers in ((student, (0, 1)), (teacher, (2, 5)))
    )
    distances = []
    for name, state, goal in zip(("embeddings", "0-2", "1-5"), own, target, strict=True):
        weight = trainer.terms.projections[name].weight.detach()
        assert weight.shape == (64, 16)
        distances.append((state @ weight.T - goal)[valid].square().mean().item())
    log = trainer.state.log_history[0]
    assert log["loss/embeddings"] == pytest.approx(distances[0], rel=1e-5)
    assert log["loss/hidden"] == pytest.approx(sum(distances[1:]) / 2, rel=1e-5)


@pytest.mark.parametrize("other", [{"layers": 6}, {"hidden_size": 64}, {"num_key_value_heads": 4}, {"pruned": True}])
@pytest.mark.parametrize("term", ["hidden", "attention", "relations"])
def test_lineage_is_refused_of_a_teacher_that_the_student_was_not_cut_from(tmp_path, term, other):
    def cut(model, *layers):
        return student_of_rows(model, [LayerPlan(i, (0, 1), tuple(range(64))) for i in layers])

    pruned = "pruned" in other
    sizes = {"layers": 6} if pruned else {"layers": 4, **other}
    student, teacher = cut(causal_model(layers=4), 1, 3), causal_model(seed=1, **sizes)
    losses = {term: {"layers": "lineage", **({"heads": 4} if term == "relations" else {})}}
    accepted = f"losses.{term}.layers: got 'lineage'; accepted: uniform, last .*not pruned from this teacher$"
    with pytest.raises(InputError, match=accepted):
        trainer_of(tmp_path, student, cut(teacher, 0, 1, 3, 5) if pruned else teacher, [], losses)
    original = causal_model(layers=4, seed=2)
    trainer_of(tmp_path, student, cut(original, 0, 1, 3) if pruned else original, [], losses)


def test_lineage_of_a_grouped_query_model_compares_all_queries_of_the_kept_groups(tmp_path):
    teacher = causal_model(layers=4, attn_implementation="eager")
    student = student_of_rows(teacher, [LayerPlan(i, (1,), tuple(range(64))) for i in (1, 3)])
    data = rows(teacher)
    _, log = step_gradient(tmp_path, student, teacher, data, {"attention": {}})
    batch = stacked(data, "input_ids", "attention_mask")
    plain = copy.deepcopy(student)
    plain.set_attn_implementation("eager")
    maps = [model.eval()(**batch, output_attentions=True).attentions for model in (plain, teacher)]
    valid, total = batch["attention_mask"].float(), 0.0
    for layer, source in ((0, 1), (1, 3)):
        p, q = maps[1][source][:, [2, 3]], maps[0][layer]
        rows_kl = torch.xlogy(p, p / q.clamp(min=1e-30)).sum(-1).mean(1)
        total = total + (rows_kl * valid).sum() / valid.sum() / 2
    assert log["loss/attention"] == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm", "causal-lm"])
def test_dkd_is_a_mean_over_labelled_items(tmp_path, head):
    teacher, student = model_of(head, layers=4), model_of(head, layers=2, seed=1)
    data = rows(teacher)
    if head == "sequence-classification":
        data[0]["labels"] = torch.tensor(-100)
    else:
        data[0]["labels"][2:] = -100
    _, log = step_gradient(
        tmp_path, student, teacher, data, {"logits": {"divergence": "dkd", "alpha": 0.5, "beta": 2.0}}
    )
    batch, labels = stacked(data, "input_ids", "attention_mask"), stacked(data, "labels")["labels"]
    q, p = (model(**batch).logits.double().softmax(-1) for model in (student, teacher))
    if head == "causal-lm":
        q, p, labels = q[:, :-1], p[:, :-1], labels[:, 1:]
    q, p, labels = (each[labels != -100] for each in (q, p, labels))
    (q_true, p_true), values = (each.gather(-1, labels[:, None])[:, 0] for each in (q, p)), []
    for i, label in enumerate(labels):
        binary = p_true[i] * (p_true[i] / q_true[i]).log() + (1 - p_true[i]) * ((1 - p_true[i]) / (1 - q_true[i])).log()
        rest = torch.arange(q.shape[-1]) != label
        a, b = p[i, rest] / (1 - p_true[i]), q[i, rest] / (1 - q_true[i])
        values.append(0.5 * binary + 2.0 * (a * (a / b).log()).sum())
    assert log["loss/logits"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)


def test_weights_and_temperature_follow_their_schedules_at_each_optimizer_step(tmp_path):
    teacher, student = model_of("masked-lm", layers=4), model_of("masked-lm", layers=2, seed=1)
    weight, temperature = {"start": 1, "end": 0, "share": 0.5}, {"start": 4, "end": 1, "schedule": "cosine", "steps": 3}
    losses = {"labels": {"weight": 0.5}, "logits": {"weight": weight, "temperature": temperature}}
    settings = {
        "learning_rate": 0.0,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    data = rows(teacher)
    trainer = trainer_of(tmp_path, student, teacher, data, losses, **settings)
    trainer.train()
    history = [log for log in trainer.state.log_history if "loss" in log]
    logits = [model(**stacked(data, "input_ids", "attention_mask")).logits for model in (student.eval(), teacher)]
    valid = stacked(data, "attention_mask")["attention_mask"].bool()
    for step, log in enumerate(history):
        t = Schedule(**temperature).at(step, 6)
        q, p = ((each[valid].double() / t).softmax(-1) for each in logits)
        assert ("loss/logits" in log) == (step < 3)  # where its weight is 0, a term is not computed
        if step < 3:
            assert log["loss/logits"] == pytest.approx((t * t * (p * (p / q).log()).sum(-1)).mean().item(), rel=1e-4)
        expected = 0.5 * log["loss/labels"] + max(0.0, 1 - step / 3) * log.get("loss/logits", 0.0)
        assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert len(history) == 6


@pytest.mark.parametrize(
    "losses, change, words",
    [
        ({"relations": {"heads": 5}}, {}, "losses.relations.heads: got 5; .* 1, 2, 4, 8, 16, 32$"),
        ({"relations": {"layers": [[0, 9]]}}, {}, "losses.relations.layers"),
        ({"relations": {"layers": "lineage"}}, {}, "losses.relations.layers.*not pruned"),
        ({"relations": {"heads": 4}}, {"activation_checkpointing_kwargs": {"use_reentrant": True}}, "losses.relations"),
        ({"logits": {"divergence": "tvd"}}, {"models": {"num_labels": 1}}, "losses.logits.divergence.*mse"),
    ],
)
def test_settings_that_do_not_fit_the_models_are_refused_before_training(tmp_path, losses, change, words):
    labels, settings = change.get("models", {}), {k: v for k, v in change.items() if k != "models"}
    with pytest.raises(InputError, match=words) as error:
        trainer_of(tmp_path, tiny_model(layers=2, **labels), tiny_model(seed=1, **labels), [], losses, **settings)
    assert "\n" not in str(error.value)


def test_dkd_of_data_without_labels_is_refused_in_one_line(tmp_path):
    teacher, student = tiny_model(), tiny_model(layers=2, seed=1)
    data = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows(teacher)]
    trainer = trainer_of(tmp_path, student, teacher, data, {"logits": {"divergence": "dkd"}})
    with pytest.raises(InputError, match="losses.logits.divergence.*without labels"):
        trainer.train()


@pytest.mark.parametrize("term", ["labels", "logits", "embeddings", "hidden", "attention", "relations", "dkd"])
def test_packed_sequences_give_every_term_and_its_gradient_as_rows_of_their_own(tmp_path, term):
    losses = {
        "hidden": {"hidden": {"layers": "uniform"}},
        "attention": {"attention": {"layers": "uniform"}},
        "relations": {"relations": {"layers": "uniform", "heads": 4}},
        "dkd": {"logits": {"divergence": "dkd"}},
    }.get(term, {term: {}})
    teacher, student = causal_model(layers=4), causal_model(layers=2, seed=1, hidden_size=24, head_dim=6)
    lengths, width = (5, 7), 14  # two places of padding after the packed row
    ids = [torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    columns = {
        "input_ids": (0, ids),
        "attention_mask": (0, [torch.ones_like(each) for each in ids]),
        "labels": (-100, ids),  # the first of a sequence too: nothing in its own sequence predicts it
        "position_ids": (0, [torch.arange(n) for n in lengths]),
    }

    def row(parts, pad):
        joined = torch.cat(parts)
        return torch.cat([joined, joined.new_full((width - len(joined),), pad)])

    packed = [{name: row(parts, pad) for name, (pad, parts) in columns.items()}]
    plain = [
        {name: row([parts[i]], pad) for name, (pad, parts) in columns.items() if name != "position_ids"} for i in (0, 1)
    ]
    (together, log), (apart, expected) = (
        step_gradient(tmp_path, student, teacher, data, losses) for data in (packed, plain)
    )
    assert expected["loss"] > 0 and log["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
