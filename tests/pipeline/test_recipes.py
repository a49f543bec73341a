"""The shipped recipes run from end to end, with tiny local models and files in the place of the Hub's."""

import json
from pathlib import Path

import pytest
import torch
from builders.causal import causal_model, word_tokenizer
from builders.recipes import WORDS, write_model
from transformers import AutoModel, AutoModelForMaskedLM

import distill_llm
from distill_llm.recipe.recipe import load_recipe, recipe_names

STEPS = ["max_steps=2", "per_device_train_batch_size=4"]
SMALL = [
    *(f"{section}.{step}" for section in ("teacher.train", "distillation", "final") for step in STEPS),
    "data.max_length=24",
    "evaluation.latency={batch_size: 2, sequence_length: 8}",
]


def teacher(folder: Path, **model) -> str:
    """A BERT of twelve layers, as the recipes expect, tiny in every other way."""
    return str(
        write_model(
            folder / "teacher", layers=12, hidden=16, heads=2, intermediate=32, max_position_embeddings=64, **model
        )
    )


def sentences(count: int) -> list[str]:
    return [" ".join(WORDS[5 + (i + k) % 7] for k in range(2 + i % 5)) for i in range(count)]


@pytest.mark.slow
def test_bert_sst2_halves_the_layers(tmp_path):
    (tmp_path / "glue").mkdir()
    for split, count in (("train", 32), ("dev", 8)):
        rows = [f"{text}\t{i % 2}" for i, text in enumerate(sentences(count))]
        (tmp_path / "glue" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    local = [f"teacher.model={teacher(tmp_path)}", f"data.path={tmp_path / 'glue'}", "pruning.calibration_examples=16"]
    recipe = load_recipe("bert_sst2", [*SMALL, *local, "pruning.round_to=2"])
    result = distill_llm.run(recipe, tmp_path / "run")
    assert 0.49 < result.metrics["layer_params_kept"] <= 0.5


@pytest.mark.slow
def test_bert_glue_95_leaves_a_twentieth_of_the_layers(tmp_path):
    (tmp_path / "glue").mkdir()
    labels = ("entailment", "neutral", "contradiction")
    for split, count in (("train", 36), ("dev_matched", 9)):
        rows = [f"{text}\t{text[::-1]}\t{labels[i % 3]}" for i, text in enumerate(sentences(count))]
        (tmp_path / "glue" / f"{split}.tsv").write_text("\n".join(["sentence1\tsentence2\tgold_label", *rows]) + "\n")
    local = [f"teacher.model={teacher(tmp_path)}", f"data.path={tmp_path / 'glue'}", "pruning.calibration_examples=16"]
    recipe = load_recipe("bert_glue_95", [*SMALL, *local, "pruning.rounds=3"])
    result = distill_llm.run(recipe, tmp_path / "run")
    assert 0.035 < result.metrics["layer_params_kept"] <= 0.05
    assert [row["round"] for row in result.metrics["rounds"]] == [1, 2, 3]


@pytest.mark.slow
def test_bert_to_distilbert_keeps_every_second_layer_of_a_masked_lm_and_loads_as_stock_bert(tmp_path):
    for split, count in (("train", 200), ("test", 40)):
        (tmp_path / "text").mkdir(exist_ok=True)
        rows = [json.dumps({"text": text}) for text in sentences(count)]
        (tmp_path / "text" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    model = teacher(tmp_path, head="masked-lm")
    small = [setting for setting in SMALL if not setting.startswith("teacher.train")]
    recipe = load_recipe("bert_to_distilbert", [*small, f"teacher.model={model}", f"data.path={tmp_path / 'text'}"])
    result = distill_llm.run(recipe, tmp_path / "run")
    student = AutoModelForMaskedLM.from_pretrained(result.student_dir)
    assert student.config.num_hidden_layers == 6 and type(student).__name__ == "BertForMaskedLM"
    assert AutoModel.from_pretrained(result.student_dir).config.num_hidden_layers == 6
    pruned = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "round-1" / "pruned")
    dense = AutoModelForMaskedLM.from_pretrained(model)
    for index, layer in enumerate(pruned.bert.encoder.layer):
        same = dense.bert.encoder.layer[recipe.pruning.layers[index]]
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), same.parameters(), strict=True))


def decoder(folder: Path, **sizes) -> str:
    """A tiny Llama with its tokenizer, and a text of random words in `folder`/text.txt."""
    model, tokenizer = causal_model(max_position_embeddings=64, **sizes), word_tokenizer()
    model.save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    draw = torch.Generator().manual_seed(0)
    rows = [" ".join(f"w{i}" for i in torch.randint(90, (20,), generator=draw).tolist()) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(rows) + "\n")
    return str(folder / "decoder")


@pytest.mark.parametrize(
    "name",
    ["smollm2_width", "llama_width", "llama_depth"],
)
def test_decoder_recipes_run_from_text_to_a_student_that_generates(tmp_path, name):
    layers = 8 if name == "llama_depth" else 2
    small = [setting for setting in SMALL if not setting.startswith(("teacher.train", "final"))]
    local = [f"teacher.model={decoder(tmp_path, num_hidden_layers=layers)}", f"data.path={tmp_path / 'text.txt'}"]
    local += ["distillation.gradient_accumulation_steps=2", "pruning.calibration_examples=8"]
    local += [] if name == "llama_depth" else ["pruning.round_to=4"]
    recipe = load_recipe(name, [*small, *local, "teacher.dtype=float32"])
    metrics = distill_llm.run(recipe, tmp_path / "run").metrics
    assert metrics["metric"] == "perplexity" and metrics["retention"] > 0
    assert 0.5 < metrics["layer_params_kept"] <= 0.75 + 1e-6
    student = distill_llm.load_pretrained(tmp_path / "run" / "student").eval()
    assert (type(student).__name__ == "LlamaForCausalLM") == (name != "smollm2_width"), "even ones are stock"
    prompt = torch.tensor([[5, 6, 7]])
    cached = student.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    for step in range(3, cached.shape[1]):
        assert student(cached[:, :step]).logits[0, -1].argmax() == cached[0, step]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_script_that_its_first_line_runs(name):
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    assert path.read_text().startswith("#!/usr/bin/env -S distill-llm run\n")
    assert path.stat().st_mode & 0o111
