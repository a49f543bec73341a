"""Rules of what a model can read: each takes facts and returns faults under the caller's names."""

import pytest
import torch
from builders.causal import word_tokenizer
from datasets import Dataset
from transformers import AutoConfig, AutoModel

from distill_llm.architectures.families import OTHERS
from distill_llm.models.limits import (
    InputLimits,
    RowFacts,
    length_faults,
    longest_input,
    longest_prompt,
    masking_faults,
    read_rows,
    room_faults,
    row_faults,
)

SMALL = InputLimits("tiny", "opt", longest=8, vocabulary=10, decoder=True)


def lines(faults) -> list[str]:
    return [str(fault) for fault in faults]


@pytest.mark.parametrize(
    ("prompt", "new", "line"),
    [
        (5, 3, None),
        (5, 4, "--new: got 4; accepted: at most 3: tiny takes 8 tokens, and a prompt has 5"),
        (8, 1, "rows: got 'a prompt of 8 tokens'; accepted: prompts of fewer than 8 tokens, the longest input of tiny"),
    ],
)
def test_prompt_and_response_together_stay_within_the_positions(prompt, new, line):
    assert lines(room_faults(SMALL, prompt, new, "--new", "rows")) == ([] if line is None else [line])


def test_a_model_without_bounds_refuses_nothing():
    free = InputLimits("free", "bert", None, None, decoder=False)
    assert not length_faults(free, 10**9, "x") and not room_faults(free, 10**9, 1, "x", "y")
    assert not row_faults(free, RowFacts(longest=10**9), "x") and not masking_faults(free, 10**9, "x", "y")
    assert lines(length_faults(SMALL, 9, "x")) == ["x: got 9; accepted: at most 8, the longest input of tiny"]
    assert not length_faults(SMALL, 8, "x") and not masking_faults(SMALL, 10, "x", "y")
    assert len(masking_faults(SMALL, 11, "x", "y")) == 1


@pytest.mark.parametrize("kind", [Dataset.from_list, list, tuple])
def test_facts_of_rows_are_those_of_a_row_by_row_look(kind):
    ids = [[1, 2, 3], [4], [11, 5, 6, 12], [7] * 2500]
    rows = [{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids] * 700  # more than are read at once
    found = read_rows(kind(rows), SMALL)
    beyond = next((i, max(each)) for i, each in enumerate(ids) if max(each) >= 10)
    assert found == RowFacts(longest=2500, beyond=(beyond[0], 11), packed=False) and beyond == (2, 12)
    assert read_rows(kind(rows), SMALL, tokens=False).beyond is None
    fine = [{"input_ids": [1, 2]}] * 1500
    assert read_rows(kind([*fine, {"input_ids": [10]}, *fine]), SMALL).beyond == (1500, 10)
    assert read_rows(iter(rows), SMALL) == RowFacts(), "what may be read once only is not read"


@pytest.mark.parametrize(
    ("positions", "mask", "packed"),
    [
        ([0, 1, 2, 3], [1, 1, 1, 1], False),
        ([0, 1, 0, 1], [1, 1, 1, 1], True),
        ([0, 1, 2, 0], [1, 1, 1, 0], False),  # padding at the end
        ([1, 1, 0, 1], [0, 0, 1, 1], False),  # padding at the start
        ([0, 0, 0, 0], [1, 1, 1, 1], True),
    ],
)
def test_rows_are_packed_where_positions_of_their_tokens_start_again(positions, mask, packed):
    row = {"input_ids": [1, 2, 3, 4], "position_ids": positions, "attention_mask": mask}
    found = read_rows(Dataset.from_list([row, row]), SMALL)
    own = [position for position, valid in zip(positions, mask, strict=True) if valid]
    assert (found.packed, found.longest) == (packed, max(own) + 1)
    llama = InputLimits("llama", "llama", 8, 10, decoder=True)
    assert read_rows([row], llama) == found and not row_faults(llama, found, "data"), "which keeps them apart"
    assert not read_rows([row], InputLimits("bert", "bert", 8, 10, decoder=False)).packed, "an encoder's own positions"


def test_the_longest_prompt_ends_before_the_first_label():
    labels = [[-100, -100, 5, 6], [1, 2], [-100, -100, -100], [-100, 3, -100, -100, -100]]
    assert longest_prompt(Dataset.from_dict({"labels": labels})) == 3
    assert longest_prompt([{"labels": each} for each in (labels[0], labels[1], labels[3])]) == 2
    assert longest_prompt(None) == 0


def test_a_token_at_fault_is_shown_as_text_where_there_is_a_tokenizer():
    facts = RowFacts(beyond=(3, 94))
    (line,) = lines(row_faults(SMALL, facts, "data", word_tokenizer()))
    assert line == "data: got \"'user' in row 3\"; accepted: texts whose tokens are among the 10 that tiny knows"
    assert lines(row_faults(SMALL, facts, "data"))[0].startswith("data: got 'token 94 in row 3'")


@pytest.mark.parametrize("family", [name for name, facts in OTHERS.items() if facts.skipped_positions])
def test_the_longest_input_of_a_family_without_a_row_is_the_longest_that_it_reads(family):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    own = {"longformer": {"attention_window": 4}, "luke": {"entity_vocab_size": 10, "entity_emb_size": 8}}
    own["xmod"] = {"languages": ["en"], "default_language": "en"}
    config = AutoConfig.for_model(
        family, **sizes, **own.get(family, {}), vocab_size=30, max_position_embeddings=21, pad_token_id=2
    )
    model = AutoModel.from_config(config).eval()
    longest = longest_input(config)
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))
