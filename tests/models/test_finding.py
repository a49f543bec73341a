"""Models before they are loaded: vocabularies smaller than the tokenizer's."""

import logging

import pytest
from builders.causal import causal_model, data_of, word_tokenizer
from builders.models import tiny_model
from builders.recipes import recipe_for

from distill_llm.checks.recipe import open_recipe
from distill_llm.common.errors import InputError
from distill_llm.data.encoding import encode
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.data.kinds.masked_lm import masked_lm
from distill_llm.models.finding import check_tokens, open_model
from distill_llm.pipeline.context import Context
from distill_llm.recipe.recipe import parse_recipe

WORDS = 97  # of the tokenizer, before any is added


def save(folder, model, **special) -> str:
    """A model and the tokenizer of words with a token more, that no text has to hold unless it is named in `special`."""
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(**special)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert len(tokenizer) == WORDS + 1
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_token_that_no_text_holds_may_be_beyond_the_models_vocabulary(tmp_path, caplog):
    """Gemma 3 1B has 262144 embeddings, and an image token behind them."""
    path = save(tmp_path, causal_model(vocab_size=WORDS))
    with caplog.at_level(logging.WARNING, logger="distill_llm"):
        opened = open_model("teacher.model", path)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("distill_llm")]
    assert "1 of its tokenizer's tokens (<image>)" in line
    fine = encode(data_of(causal_lm("text", "text"), text=["w1 w2 w3"] * 4), opened.tokenizer, 16)
    assert check_tokens(fine, opened, "data.path") is fine
    texts = encode(
        data_of(causal_lm("text", "text"), text=["w1 w2 w3 w4 w5 w6 w7", "w1 <image> w2"]), opened.tokenizer, 8
    )
    with pytest.raises(
        InputError, match=r"^data.path: got \"'<image>' in row 1\"; accepted: texts whose tokens are among the 97 that"
    ):
        check_tokens(texts, opened, "data.path")
    save(tmp_path, causal_model(vocab_size=WORDS + 1))
    assert check_tokens(texts, open_model("teacher.model", path), "data.path") is texts, "the model has it"


def test_masked_words_that_may_become_any_token_need_all_of_them(tmp_path):
    path = save(tmp_path, tiny_model(head="masked-lm", vocab=WORDS), pad=True, mask_token="<unk>")
    opened = open_model("teacher.model", path)
    rows = encode(data_of(masked_lm("text", "text"), text=["w1 w2 w3"] * 4), opened.tokenizer, 16)
    with pytest.raises(InputError, match="with a tokenizer of 98 tokens'; accepted: .*97.* a masked word may"):
        check_tokens(rows, opened, "data.path")


@pytest.mark.parametrize(
    ("vocabulary", "special"), [(WORDS, {"pad_token": "<image>"}), (WORDS - 1, {})], ids=["pad", "word"]
)
def test_tokens_that_rows_hold_anyway_are_refused_at_the_door(tmp_path, vocabulary, special):
    path = save(tmp_path, causal_model(vocab_size=vocabulary), **special)
    with pytest.raises(InputError, match=f"a tokenizer of at most {vocabulary} tokens, as the model has; it has 98"):
        open_model("teacher.model", path)


def test_a_runs_own_rows_are_checked(tmp_path):
    path = save(tmp_path / "teacher", causal_model(vocab_size=WORDS))
    (tmp_path / "text.txt").write_text("\n\n".join(f"w{i} <image> w{i + 1}" for i in range(40)))
    data = {"task": "text", "path": str(tmp_path / "text.txt"), "max_length": 16}
    recipe = recipe_for(tmp_path, teacher={"model": path}, data=data)
    with pytest.raises(InputError, match="'<image>' in row"):
        _ = Context(open_recipe(parse_recipe(recipe))).data
