"""Terms as objectives read them: the registry, and what each says it goes with."""

from typing import ClassVar

import pytest
from pydantic import ValidationError

from distill_llm.common.validation import faults_of
from distill_llm.losses.objective import Objective, parse_objective
from distill_llm.losses.terms import BUILT_IN
from distill_llm.losses.terms import term as terms
from distill_llm.losses.terms.term import Gives, Term, Use

KINDS = ("example", "token", "next_token")
FEW, ALL = Gives("a cached teacher", few=(5, 100), new_text=False), Gives("a cached teacher", new_text=False)
RELATED = ("rkd_distance", "rkd_angle", "similarity", "correlation")
REMEMBERED = ("contrast", "qud", "adadistill")
OF_EXAMPLES = (*RELATED, "channels", "flow", *REMEMBERED)
OF_LAYERS = ("embeddings", "hidden", "attention", "relations", *OF_EXAMPLES, "neurons", "gradients")
PROJECTED = ("embeddings", "hidden", "channels", "flow", *REMEMBERED)
OF_CLASSES = ("distillm2", "smoothing", "ranking", "focal", "own_temperature")
OF_TEXTS = ("cross_tokenizer",)


@pytest.fixture
def copy_term():
    """A term of a module of its own, with the name of a method of pydantic's models."""
    terms.all_terms()

    @terms.term("copy")
    class Copy(Term):
        signals: ClassVar[tuple[terms.Signal, ...]] = ("logits", "vectors")
        needs_teacher: ClassVar[bool] = False

        def sum(self, batch, match, pairs):
            return batch.zero()

    yield Copy
    del terms.TERMS["copy"]


def test_terms_are_in_the_order_of_the_registry_whatever_the_order_of_a_mapping(copy_term):
    objective = parse_objective({"copy": None, "hidden": None, "labels": None})
    assert list(objective.terms()) == ["labels", "hidden", "copy"]
    assert isinstance(objective.terms()["copy"], copy_term) and objective.attention is None
    assert list(objective.only(["hidden"]).terms()) == ["hidden"] and list(objective.terms()) == [
        "labels",
        "hidden",
        "copy",
    ]


def test_terms_that_are_left_out_are_not_written_and_may_be_given_as_null(copy_term):
    objective = parse_objective({"hidden": {}, "labels": {"weight": 0.5}})
    written = objective.model_dump(mode="json")
    assert list(written) == ["labels", "hidden"] and written["labels"] == {"weight": 0.5}
    assert Objective.model_validate(written) == objective
    assert Objective.model_validate({**dict.fromkeys(BUILT_IN), **written, "responses": None}) == objective
    assert parse_objective({"copy": {}}).model_dump(mode="json") == {"copy": {"weight": 1.0}}


@pytest.mark.parametrize(
    "mapping, units",
    [
        ({"labels": {}}, ("labels", "labels", "labels")),
        ({"logits": {}}, ("examples", "tokens", "labels")),
        ({"logits": {"divergence": "dkd"}}, ("labels", "labels", "labels")),
        ({"embeddings": {}}, ("tokens", "tokens", "tokens")),
        ({"hidden": {}}, ("tokens", "tokens", "tokens")),
        ({"attention": {}}, ("tokens", "tokens", "tokens")),
        ({"relations": {}}, ("tokens", "tokens", "tokens")),
    ],
)
def test_what_each_term_is_averaged_over(mapping, units):
    (term,) = parse_objective(mapping).terms().values()
    assert tuple(term.unit(kind) for kind in KINDS) == units


@pytest.mark.parametrize(
    "use, faulty",
    [
        (Use(), {}),
        (Use(teacher=ALL), dict.fromkeys((*OF_LAYERS, *OF_TEXTS), "losses.{}: ")),
        (Use(teacher=FEW), dict.fromkeys((*OF_LAYERS, *OF_TEXTS, *OF_CLASSES), "losses.{}: ")),
        (Use(widths=(8, 16)), {"gradients": "losses.{}: "}),
        (Use(widths=(8, 16), sharding="FSDP2"), {"gradients": "losses.{}: "}),
        (Use(sharding="DeepSpeed"), {"gradients": "losses.{}: "}),
        (Use(widths=(8, 16), sharding="DeepSpeed"), dict.fromkeys((*PROJECTED, "gradients"), "losses.{}: ")),
        (
            Use(reentrant="kwargs.use_reentrant"),
            {**dict.fromkeys(("attention", "relations", "neurons"), "kwargs.use_reentrant: "), "exits": "losses.{}: "},
        ),
        (Use(cut=True, layers=(2, 4)), {}),
        (Use(cut=False), dict.fromkeys(("hidden", "attention", "neurons"), "losses.{}.layers: ")),
        (
            Use(single_output=True),
            {
                "logits": "losses.logits.divergence: ",
                **dict.fromkeys((*OF_CLASSES, "adadistill", "exits"), "losses.{}: "),
            },
        ),
        (Use(classes=2), {"own_temperature": "losses.{}.by: "}),
        (Use(classes=3, rows=(3, 3)), {}),
        (Use(rows=(2, 4)), {"rkd_angle": "losses.{}.over: "}),
        (Use(rows=(1, 4)), dict.fromkeys(RELATED, "losses.{}.over: ")),
        (Use(packed="data.packing"), dict.fromkeys((*OF_EXAMPLES, "gradients"), "losses.{}: ")),
        (Use(vector_widths=frozenset((16, 24))), {}),
        (
            Use(unlabelled="rows that are made"),
            {
                **dict.fromkeys(("labels", "smoothing", "adadistill"), "losses.{}: "),
                "gradients": "losses.{}.of: ",
                "exits": "losses.{}.labels: ",
            },
        ),
    ],
    ids=str,
)
def test_each_term_says_what_it_does_not_go_with(use, faulty):
    for name in BUILT_IN:
        found = [str(fault) for fault in parse_objective({name: {}}).faults(use)]
        assert bool(found) == (name in faulty) and len(found) <= 1 + (name == "gradients"), (name, found)
        assert not found or found[0].startswith(faulty[name].format(name))


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"divergence": "reverse_kl"}, ["divergence"]),
        ({"temperature": 2}, ["temperature"]),
        ({"top_k": 3}, ["top_k"]),
        ({"divergence": "skew_kl", "skew": 0.2, "temperature": 2}, ["divergence", "temperature", "skew"]),
    ],
)
def test_a_few_tokens_of_each_item_allow_one_divergence(settings, names):
    objective = parse_objective({"logits": settings})
    assert [fault.field for fault in objective.faults(Use(teacher=FEW))] == [f"losses.logits.{name}" for name in names]
    assert objective.faults(Use(teacher=ALL)) == []


def test_a_term_of_whole_outputs_does_not_go_with_a_few_tokens_unless_it_needs_no_teacher(copy_term):
    class Whole(Term):
        signals: ClassVar[tuple[terms.Signal, ...]] = ("logits",)

    class Alone(Whole):
        needs_teacher: ClassVar[bool] = False

    (fault,) = Whole().faults(Use(teacher=FEW))
    assert fault.given == "a cache of 5 of 100 classes"
    assert [*Whole().faults(Use(teacher=ALL)), *Alone().faults(Use(teacher=FEW))] == []
    assert Whole.needs_logits() and copy_term.needs_logits() and copy_term.looks_inside() and not Whole.looks_inside()


def test_relation_heads_divide_the_layers_whichever_heads_pruning_leaves():
    objective = parse_objective({"relations": {"heads": 6}})
    (fault,) = objective.faults(Use(vector_widths=frozenset((16, 24))), "distillation.losses")
    assert fault.field == "distillation.losses.relations.heads" and fault.accepted.endswith("16, 24: 1, 2, 4, 8")
    (fault,) = objective.faults(Use(vector_widths=frozenset((24, 48)), head_size=8))
    assert "divisor of 8, the size of a head" in fault.fix
    assert objective.faults(Use(vector_widths=frozenset((24, 48)), head_size=12)) == []


@pytest.mark.parametrize("name", ["labels", "responses", "two words"])
def test_a_name_that_is_taken_or_none_is_refused(name):
    terms.all_terms()
    with pytest.raises(ValueError, match=name):
        terms.term(name)(type("Other", (Term,), {}))


def test_faults_of_several_terms_are_found_together():
    with pytest.raises(ValidationError) as error:
        Objective.model_validate({"labels": {"weight": -1}, "hidden": {"layers": "frst"}, "lables": {}})
    found = [fault.field for fault in faults_of(error.value, Objective)]
    assert found == ["lables", "labels.weight", "hidden.layers"]
