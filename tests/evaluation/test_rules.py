"""What scoring refuses, under the names of the Python call and of the command."""

import json

import pytest
from builders.causal import causal_model, data_of, word_tokenizer, words
from datasets import Dataset
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.data.encoding import collator, encode
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.data.kinds.prompts import prompts
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.evaluation.rules import ScoringFields

TOKENIZER = word_tokenizer()


def score(task, rows, **model):
    """The metrics of a tiny model of up to 16 tokens."""
    model = causal_model(**{"max_position_embeddings": 16, **model})
    return evaluate_model(model, rows, task, collator(task, TOKENIZER), progress=False)


def text_rows(*lengths: int, token: int = 5) -> Dataset:
    ids = [[token] * length for length in lengths]
    columns = {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "labels": ids, "length": list(lengths)}
    return Dataset.from_dict(columns)


def test_rows_longer_than_the_positions_are_refused_by_name():
    assert score(causal_lm("text", "text"), text_rows(16, 3))["perplexity"] > 0
    line = (
        "^dataset: got 'a row of 17 tokens'; accepted: rows of at most 16 tokens, the longest input of LlamaForCausalLM"
    )
    with pytest.raises(InputError, match=line):
        score(causal_lm("text", "text"), text_rows(3, 17))


def test_tokens_without_an_embedding_are_refused_by_name():
    assert score(causal_lm("text", "text"), text_rows(4, token=96))["perplexity"] > 0
    with pytest.raises(
        InputError, match="^dataset: got 'token 97 in row 0'; accepted: texts whose tokens are among the 97"
    ):
        score(causal_lm("text", "text"), text_rows(4, token=97))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_packed_rows_of_a_family_that_mixes_them_are_refused(family):
    rows = text_rows(4).add_column("position_ids", [[0, 1, 0, 1]])
    if family == "llama":
        assert score(causal_lm("text", "text"), rows)["perplexity"] > 0
        return
    with pytest.raises(InputError, match="^dataset: got 'packed rows'; leave packing out: opt mixes"):
        score(causal_lm("text", "text"), rows, family=family, word_embed_proj_dim=32)


def test_generation_past_the_positions_is_refused_by_name_before_a_token_is_generated():
    for new, passes in ((11, True), (12, False)):
        task = prompts(metric="exact_match", max_new_tokens=new)
        data = data_of(task, prompt=[words(1, 2, 3, 4, 5), words(1)], response=[words(6), words(7, 8)])
        rows = encode(data, TOKENIZER, 16).test
        if passes:
            assert "exact_match" in score(task, rows)
            continue
        line = "^task.max_new_tokens: got 12; accepted: at most 11: LlamaForCausalLM takes 16 tokens"
        with pytest.raises(InputError, match=line):
            score(task, rows)
        task = prompts(max_new_tokens=new)
        assert "perplexity" in score(task, rows), "which generates nothing"


def test_the_command_names_its_options_before_it_loads_weights(tmp_path, monkeypatch):
    for part in (causal_model(max_position_embeddings=16), TOKENIZER):
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": words(*range(i, i + 5)), "response": words(i)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("distill_llm.cli.evaluate.load_model", None)
    given = ["evaluate", str(tmp_path / "model"), "--task", "prompts", "--data", str(tmp_path / "rows.jsonl")]
    given += ["--output", str(tmp_path / "metrics.json"), "--metric", "exact_match"]
    for more, line in (
        (["--max-length", "17"], "--max-length: got 17; accepted: at most 16, the longest input of "),
        (["--max-length", "16", "--max-new-tokens", "12"], "--max-new-tokens: got 12; accepted: at most 11: "),
    ):
        result = CliRunner().invoke(app, [*given, *more])
        assert result.exit_code == 2 and f"error: {line}" in result.stderr, result.stderr
    assert not (tmp_path / "metrics.json").exists()


def test_faults_of_rows_have_the_names_of_the_door_that_asked():
    task, none, fields = causal_lm("text", "text"), text_rows(4).select([]), ScoringFields("data.path", "--new")
    pad = collator(task, TOKENIZER)
    for rows, given in ((none, "no rows"), (text_rows(1), "1 rows without a token to predict")):
        with pytest.raises(InputError, match=f"^data.path: got '{given}'"):
            evaluate_model(causal_model(), rows, task, pad, progress=False, fields=fields)
        with pytest.raises(InputError, match=f"^dataset: got '{given}'"):
            evaluate_model(causal_model(), rows, task, pad, progress=False)
