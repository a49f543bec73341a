"""Answers of a served model: which of them have an end."""

import pytest
from builders.causal import word_tokenizer
from builders.served import Service, serving
from builders.trainers import causal_model

from distill_llm.models.endpoint import Endpoint
from distill_llm.responses.prompts import Prompt
from distill_llm.responses.sampling import Sampling
from distill_llm.responses.served import ServedAnswers

PROMPT = Prompt("four words", [4, 5, 6, 7], b"")


@pytest.mark.parametrize(
    ("reason", "ended"),
    [("stop", True), ("eos_token", True), (None, True), ("length", False), ("content_filter", False), ("abort", False)],
)
def test_an_answer_that_is_cut_has_no_end(reason, ended):
    class Cutting(Service):
        def answer(self, body):
            status, found = super().answer(body)
            found["choices"][0]["finish_reason"] = reason
            return status, found

    with serving(Cutting(causal_model(layers=1), word_tokenizer())) as service:
        answers = ServedAnswers(Endpoint(service.url, service.name), Sampling(max_new_tokens=4), service.tokenizer)
        (answer,) = answers([PROMPT], [b"a key"])
    assert answer.ended == ended
