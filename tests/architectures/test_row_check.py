"""A row that does not fit its model is refused in one line; every row of the package fits, whatever was pruned."""

from dataclasses import replace

import pytest
from builders.families import EVERY, IMAGES, family_batch, family_model, uneven_plan

from distill_llm import collect_statistics, load_pretrained, prune
from distill_llm.architectures.families import FAMILIES, family_of
from distill_llm.architectures.row_check import check_row
from distill_llm.pruning.units.sizes import counts_of

LLAMA = FAMILIES["llama"]
PROJECTIONS = {"self_attn.q_proj": "q", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"}


def attention(**changes):
    return {"attention_in": {**PROJECTIONS, **{f"self_attn.{name}": layout for name, layout in changes.items()}}}


WRONG = {
    "layers": ("llama", {"layers": "layerz"}, r"LlamaModel has no list 'layerz' \(layers\)"),
    "attention": ("llama", {"attention": "attn"}, r"layer 0: it has no 'attn' \(attention\)"),
    "attention_out": ("llama", {"attention_out": "self_attn.dense"}, r"no linear 'self_attn.dense' that .* \(attention_out\)"),
    "ffn_out": ("llama", {"ffn_out": "mlp"}, r"no linear 'mlp' that reads 'n' \(ffn_out\)"),
    "a path": (
        "llama",
        {"attention_in": {"self_attn.query": "q", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"}},
        r"self_attn.q_proj is a linear of the attention, .* no layout \(it names self_attn.query, which are not there\)",
    ),
    "a layout": ("llama", attention(k_proj="m"), "the layout 'm' of self_attn.k_proj is unknown"),
    "order": ("llama", attention(k_proj="kv q]"), "the layout 'kv q]' of self_attn.k_proj is unknown"),
    "q and kv swapped": (
        "llama",
        attention(q_proj="kv", k_proj="q"),
        r"self_attn.q_proj has 32 outputs, and 'kv' says 16 \(4 heads of 4 channels\)",
    ),
    "values left out": (
        "llama",
        {"attention_in": {"self_attn.q_proj": "q", "self_attn.k_proj": "kv"}},
        "self_attn.v_proj is a linear of the attention, and attention_in gives it no layout",
    ),
    "neurons left out": (
        "llama",
        {"ffn_in": {"mlp.gate_proj": "n"}},
        "mlp.up_proj is a linear over the 64 neurons, and ffn_in gives it no layout",
    ),
    "groups": ("llama", {"groups": "num_kv"}, "self_attn.k_proj has 16 outputs, and 'kv' says 32"),
    "one part of two": ("phi3", {"ffn_in": {"mlp.gate_up_proj": "n"}}, "mlp.gate_up_proj has 128 outputs, and 'n' says 64"),
    "a part too few": ("gpt2", {"attention_in": {"attn.c_attn": "q kv"}}, "attn.c_attn has 96 outputs, and 'q kv' says 64"),
    "rows of heads": ("cohere", attention(q_norm="kv/"), r"self_attn.q_norm has 8 outputs, and 'kv/' says 4 \(4 heads"),
    "no list": ("olmo2", attention(q_norm="q[]"), r"self_attn.q_norm has 32 outputs, and 'q\[\]' says 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_refused_in_one_line_before_anything_runs(name, monkeypatch):
    family, changes, message = WRONG[name]
    model = family_model(family)
    counts_of(model)  # a row that fitted says nothing of the next one
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **changes))
    for call in (counts_of, lambda model: collect_statistics(model, [family_batch(model)])):
        with pytest.raises(
            ValueError, match=f"^model: the row of family '{family}' does not fit it: .*{message}"
        ) as error:
            call(model)
        assert "\n" not in str(error.value)


def test_layers_are_looked_at_one_by_one():
    model = family_model("llama")
    model.model.layers[3].mlp.extra = type(model.model.layers[3].mlp.up_proj)(32, 64)
    with pytest.raises(ValueError, match="layer 3: mlp.extra is a linear over the 64 neurons"):
        check_row(model)


@pytest.mark.parametrize("name", [*EVERY, *IMAGES])
def test_every_row_fits_its_models_and_what_was_pruned_of_them(name):
    model = family_model(name)
    check_row(model)
    for queries in (False, True):
        student = prune(model, uneven_plan(model, hidden=True, queries=queries))
        check_row(student)  # of layers without heads or neurons too
        rows = [(len(row.heads), len(row.neurons)) for row in uneven_plan(model).layers]
        assert [(each["heads"], each["neurons"]) for each in counts_of(student)] == rows


def test_linears_that_span_no_units_need_no_layout():
    model = family_model("bert")
    layer = model.bert.encoder.layer[1]
    layer.gate = type(layer.output.dense)(32, 8)
    check_row(model)


def test_a_student_of_a_row_that_no_file_holds_warns_when_saved_and_is_explained_where_it_is_loaded(
    tmp_path, caplog, monkeypatch
):
    model = family_model("llama")
    student = prune(model, uneven_plan(model))
    student.save_pretrained(tmp_path / "in-file")
    assert not caplog.messages
    monkeypatch.setitem(FAMILIES, "llama", replace(LLAMA, packs=False))
    student.save_pretrained(tmp_path / "changed")
    assert ["the row of family 'llama' was added by a script" in message for message in caplog.messages] == [True]
    monkeypatch.delitem(FAMILIES, "llama")  # as in the copy that the checkpoint holds
    with pytest.raises(ValueError, match="family .*llama.*add the same row .* to families.py beside the weights"):
        load_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="To add a family, add a row"):
        family_of(model)
