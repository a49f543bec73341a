"""Tokens do not get into messages, whole or in part."""

import pytest

from distill_llm.common.errors import InputError, first_line
from distill_llm.common.secrets import hidden, holds_token

TOKEN = "hf_" + "aB3dE" * 7


@pytest.mark.parametrize("before", ["", "x" * 150, "x" * 185, "x" * 199])
def test_a_token_is_hidden_before_a_line_is_cut(before: str) -> None:
    text = f"{before} {TOKEN} {'y' * 400}"
    lines = [
        first_line(ValueError(text)),
        str(InputError("field", text, "nothing")),
        str(InputError(f"{before}.{TOKEN}", 1, text)),
        str(InputError("field", {"hub": [TOKEN]}, fix=text)),
    ]
    assert not [line for line in lines if any(TOKEN[: 3 + size] in line for size in range(4, len(TOKEN)))]


def test_what_a_request_sends_is_hidden_and_so_is_a_token_of_any_form_that_is_known() -> None:
    assert hidden("header b'Bearer abc-def'") == "header b'Bearer <token>'"
    assert hidden("key is 12345", "12345", None) == "key is <token>"
    assert holds_token("key is 12345", "12345") and not holds_token("key is 12345", None)
    assert hidden(f"{TOKEN}@host, hf_oauth_{TOKEN[3:]}.x-y") == "<token>@host, <token>"


def test_other_words_are_left_alone() -> None:
    text = f"hf_hub_download of hf_transfer, hf_internal_testing/tiny_random_bert_for_masked_lm, hf_{'x' * 34}, hf_{'X' * 34}"
    assert hidden(text) == text and not holds_token(text)
    assert not holds_token("curl -H 'Authorization: Bearer $HF_TOKEN'; Bearer of good news")
