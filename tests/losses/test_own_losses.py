"""Losses of a user's own: what their decorators refuse, and values of a wrong shape."""

from typing import ClassVar

import pytest
from builders.models import tiny_model
from builders.trainers import causal_model, rows, trainer_of

from distill_llm.common.errors import InputError
from distill_llm.losses import distances, divergences
from distill_llm.losses.terms import term as terms
from distill_llm.losses.terms.logits import LogitsLoss
from distill_llm.losses.terms.outputs import OutputTerm
from distill_llm.losses.terms.term import Signal, Term, term
from distill_llm.teachers import Gives, OnlineTeacher, Teacher


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is gone after it."""
    terms.all_terms()
    all_of_them = (terms.TERMS, divergences.DIVERGENCES, distances.STATE_DISTANCES, distances.MAP_DISTANCES)
    before = [dict(registry) for registry in all_of_them]
    yield
    for registry, rows_before in zip(all_of_them, before, strict=True):
        registry.clear()
        registry.update(rows_before)


def term_of(name, **members):
    return term(name)(type(name.title(), (OutputTerm,), {"__module__": __name__, **members}))


SHAPES = {
    "full": (lambda self, student, teacher: (student - teacher) ** 2, r"\({items}, {classes}\)"),
    "scalar": (lambda self, student, teacher: ((student - teacher) ** 2).mean(), r"\(\)"),
    "nothing": (lambda self, student, teacher: None, "'NoneType'"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_term_must_return_a_value_for_each_item(tmp_path, shape, causal):
    function, given = SHAPES[shape]
    term_of(shape, of_items=function)
    make = causal_model if causal else tiny_model
    student = make(layers=2)
    trainer = trainer_of(tmp_path, student, make(layers=3, seed=1), rows(student), {shape: {}})
    given = given.format(items=r"\d+", classes=100 if causal else 2)
    words = rf"^losses.{shape}.of_items: got {given}; return a tensor of shape \(\d+,\): a value for each item$"
    with pytest.raises(InputError, match=words):
        trainer.train()


@pytest.mark.parametrize("causal", [False, True])
def test_a_divergence_must_return_a_value_for_each_item(tmp_path, causal):
    @divergences.divergence()
    def whole(student, teacher):
        return (student - teacher) ** 2

    make = causal_model if causal else tiny_model
    student = make(layers=2)
    losses = {"logits": {"divergence": "whole"}}
    trainer = trainer_of(tmp_path, student, make(layers=3, seed=1), rows(student), losses)
    with pytest.raises(InputError, match=r"^divergence whole: got \(\d+, \d+\); return a tensor of shape \(\d+,\)"):
        trainer.train()


def test_names_are_not_taken_twice():
    def jsd(student, teacher):
        return (student - teacher).sum(-1)

    with pytest.raises(ValueError, match="^divergence 'jsd' exists already: choose another name"):
        divergences.divergence()(jsd)
    with pytest.raises(ValueError, match="^state distance 'cosine' exists already"):
        distances.state_distance("cosine")(jsd)
    with pytest.raises(ValueError, match="^map distance 'kl' exists already"):
        distances.map_distance("kl")(jsd)
    with pytest.raises(ValueError, match="^term 'logits' exists already"):
        term_of("logits", of_items=lambda self, student, teacher: None)
    assert divergences.DIVERGENCES["jsd"].function is divergences.jsd


def test_a_cell_of_a_notebook_may_be_run_again():
    for _ in range(2):

        def again(student, teacher):
            return (student - teacher).sum(-1)

        divergences.divergence()(again)
        distances.state_distance("again")(again)
        kind = term_of("again", of_items=lambda self, student, teacher: None)
    assert divergences.DIVERGENCES["again"].function is again is distances.STATE_DISTANCES["again"]
    assert terms.TERMS["again"] is kind


def test_what_is_no_whole_term_is_refused_when_it_is_registered():
    with pytest.raises(ValueError, match="^term 'a b': choose a name of letters"):
        term_of("a b")
    with pytest.raises(ValueError, match="^term 'bare': Bare must define of_items"):
        term_of("bare")
    with pytest.raises(ValueError, match="^term 'sumless': Sumless must define sum"):
        term("sumless")(type("Sumless", (Term,), {"__module__": __name__}))
    with pytest.raises(ValueError, match="^term 'thing': object is no subclass of Term"):
        term("thing")(object)
    with pytest.raises(ValueError, match="^term 'responses' exists already"):
        term_of("responses", of_items=lambda self, student, teacher: None)


def test_a_divergence_has_the_settings_that_objectives_have_and_defaults_for_them():
    own = set(LogitsLoss.model_fields) - {"weight", "divergence", "temperature", "top_k"}
    assert own == set(divergences.SETTINGS)

    def tsallis(student, teacher, q=2.0):
        return (student - teacher).sum(-1)

    def alpha_divergence(student, teacher, alpha):
        return (student - teacher).sum(-1)

    with pytest.raises(ValueError, match="^divergence 'tsallis': no objective can set 'q'; name it beta, skew, alpha"):
        divergences.divergence()(tsallis)
    with pytest.raises(ValueError, match="^divergence 'alpha_divergence': give 'alpha' a default"):
        divergences.divergence()(alpha_divergence)
    assert not {"tsallis", "alpha_divergence"} & set(divergences.DIVERGENCES)


class Members(Teacher):
    """The first of two models, with no model whose layers are compared."""

    gives = Gives("two models", ("logits", "hidden", "attention", "vectors"))

    def __init__(self, *models):
        self.members = [OnlineTeacher(model) for model in models]

    def meet(self, student, tokenizer=None):
        return self.members[0].meet(student, tokenizer)

    def signals(self, batch, step=0, positions=None, compact=False):
        return self.members[0].signals(batch, step, positions)


@pytest.mark.parametrize("name", ["hidden", "attention", "relations", "embeddings"])
def test_a_term_of_layers_needs_a_teacher_with_layers(tmp_path, name):
    teacher = Members(tiny_model(seed=1), tiny_model(seed=2))
    with pytest.raises(InputError, match=f"^losses.{name}: got 'a teacher whose model is None'; set .*`model`"):
        trainer_of(tmp_path, tiny_model(layers=2), teacher, [], {name: {}})
    teacher.model = teacher.members[0].model
    trainer_of(tmp_path, tiny_model(layers=2), teacher, [], {name: {} if name == "embeddings" else {"layers": "last"}})


def test_a_term_of_layers_without_a_pair_of_layers_is_refused(tmp_path):
    @term("pairless")
    class Pairless(Term):
        signals: ClassVar[tuple[Signal, ...]] = ("hidden",)

        def sum(self, batch, match, pairs):
            return batch.zero()

    assert issubclass(Pairless, Term)
    with pytest.raises(InputError, match="^losses.pairless: got 'no pair of layers'; compare layers that both"):
        trainer_of(tmp_path, tiny_model(layers=2), tiny_model(seed=1), [], {"pairless": {}})
