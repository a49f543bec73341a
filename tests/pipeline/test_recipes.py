"""The shipped recipes run from end to end, with tiny local models and files in the place of the Hub's."""

import json
from pathlib import Path

import pytest
import torch
from builders.causal import THINKING_TEMPLATE, causal_model, word_tokenizer
from builders.recipes import WORDS, write_decoder, write_model
from transformers import AutoModel, AutoModelForMaskedLM

import distill_llm
from distill_llm.architectures.lineage import lineage_of
from distill_llm.recipe.recipe import load_recipe, recipe_names

STEPS = ["max_steps=2", "per_device_train_batch_size=4"]
SMALL = [
    *(f"{section}.{step}" for section in ("teacher.train", "distillation", "final") for step in STEPS),
    "data.max_length=24",
    "evaluation.latency={batch_size: 2, sequence_length: 8}",
]


def small(name: str, *local: str) -> list[str]:
    """Settings that make a recipe quick, of the sections that it has, and then those of the test."""
    recipe = load_recipe(name)
    has = {"teacher.train": recipe.teacher.train, "distillation": recipe.distillation, "final": recipe.final}
    left_out = tuple(section for section, given in has.items() if not given)
    examples = ["pruning.calibration_examples=16"] if recipe.pruning is not None and recipe.pruning.keep else []
    return [*(setting for setting in SMALL if not setting.startswith(left_out)), *examples, *local]


def teacher(folder: Path, **model) -> str:
    """A BERT of twelve layers, as the recipes expect, tiny in every other way."""
    sizes = {"layers": 12, "hidden": 16, "heads": 2, "intermediate": 32, "max_position_embeddings": 64}
    return str(write_model(folder / "teacher", **{**sizes, **model}))


def sentences(count: int) -> list[str]:
    return [" ".join(WORDS[5 + (i + k) % 7] for k in range(2 + i % 5)) for i in range(count)]


def glue(folder: Path, task: str) -> str:
    """The files of SST-2 or MNLI, with a few sentences."""
    (folder / "glue").mkdir()
    classes = {"sst2": ("0", "1"), "mnli": ("entailment", "neutral", "contradiction")}[task]
    head = {"sst2": "sentence\tlabel", "mnli": "sentence1\tsentence2\tgold_label"}[task]
    for split, count in (("train", 36), ("dev" if task == "sst2" else "dev_matched", 9)):
        pairs = [text if task == "sst2" else f"{text}\t{text[::-1]}" for text in sentences(count)]
        rows = [f"{text}\t{classes[i % len(classes)]}" for i, text in enumerate(pairs)]
        (folder / "glue" / f"{split}.tsv").write_text("\n".join([head, *rows]) + "\n")
    return f"data.path={folder / 'glue'}"


def text(folder: Path) -> str:
    """Plain text for masked language models."""
    (folder / "text").mkdir()
    for split, count in (("train", 200), ("test", 40)):
        rows = [json.dumps({"text": sentence}) for sentence in sentences(count)]
        (folder / "text" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return f"data.path={folder / 'text'}"


@pytest.mark.slow
def test_bert_sst2_halves_the_layers(tmp_path):
    local = [f"teacher.model={teacher(tmp_path)}", glue(tmp_path, "sst2"), "pruning.round_to=2"]
    result = distill_llm.run(load_recipe("bert_sst2", small("bert_sst2", *local)), tmp_path / "run")
    assert 0.49 < result.metrics["layer_params_kept"] <= 0.5


@pytest.mark.slow
def test_bert_glue_95_leaves_a_twentieth_of_the_layers(tmp_path):
    local = [f"teacher.model={teacher(tmp_path)}", glue(tmp_path, "mnli"), "pruning.rounds=3"]
    result = distill_llm.run(load_recipe("bert_glue_95", small("bert_glue_95", *local)), tmp_path / "run")
    assert 0.035 < result.metrics["layer_params_kept"] <= 0.05
    assert [row["round"] for row in result.metrics["rounds"]] == [1, 2, 3]


@pytest.mark.slow
def test_bert_to_distilbert_keeps_every_second_layer_of_a_masked_lm_and_loads_as_stock_bert(tmp_path):
    model = teacher(tmp_path, head="masked-lm")
    local = [f"teacher.model={model}", text(tmp_path)]
    recipe = load_recipe("bert_to_distilbert", small("bert_to_distilbert", *local))
    result = distill_llm.run(recipe, tmp_path / "run")
    student = AutoModelForMaskedLM.from_pretrained(result.student_dir)
    assert student.config.num_hidden_layers == 6 and type(student).__name__ == "BertForMaskedLM"
    assert AutoModel.from_pretrained(result.student_dir).config.num_hidden_layers == 6
    pruned = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "round-1" / "pruned")
    dense = AutoModelForMaskedLM.from_pretrained(model)
    for index, layer in enumerate(pruned.bert.encoder.layer):
        same = dense.bert.encoder.layer[recipe.pruning.layers[index]]
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), same.parameters(), strict=True))


@pytest.mark.slow
def test_michel_heads_removes_two_in_five_heads_and_nothing_else(tmp_path):
    # As in BERT base, a head is 4 x 16 of the 12 x 16 weights that go with each of a layer's channels.
    model = teacher(tmp_path, layers=6, hidden=32, heads=8, intermediate=128)
    local = [f"teacher.model={model}", glue(tmp_path, "mnli")]
    result = distill_llm.run(load_recipe("michel_heads", small("michel_heads", *local)), tmp_path / "run")
    layers = lineage_of(distill_llm.load_pretrained(result.student_dir)).layers
    assert len(layers) == 6 and all(len(layer.neurons) == 128 for layer in layers)
    assert sum(len(layer.heads) for layer in layers) / (6 * 8) == pytest.approx(0.6, abs=0.03)


@pytest.mark.slow
def test_kwon_retraining_free_leaves_three_fifths_of_the_flops_and_trains_nothing(tmp_path):
    local = [f"teacher.model={teacher(tmp_path)}", glue(tmp_path, "mnli")]
    recipe = load_recipe("kwon_retraining_free", small("kwon_retraining_free", *local))
    metrics = distill_llm.run(recipe, tmp_path / "run").metrics
    assert metrics["rounds"][0]["kept"] == pytest.approx(0.6, rel=0.01) and metrics["learned_from"] is None


@pytest.mark.slow
def test_distilbert_task_teaches_another_family_with_a_new_head(tmp_path):
    student = write_model(tmp_path / "student", family="distilbert", head="masked-lm", layers=2, hidden=16, heads=2)
    local = [f"teacher.model={teacher(tmp_path)}", f"student.model={student}", glue(tmp_path, "sst2")]
    result = distill_llm.run(load_recipe("distilbert_task", small("distilbert_task", *local)), tmp_path / "run")
    assert type(distill_llm.load_pretrained(result.student_dir)).__name__ == "DistilBertForSequenceClassification"


def test_tinybert_learns_from_layers_first_and_from_predictions_afterwards():
    losses = load_recipe("tinybert").distillation.losses
    layers, predictions = {"embeddings": 1.0, "hidden": 1.0, "attention": 1.0}, {"logits": 1.0}
    off = dict.fromkeys([*layers, *predictions], 0.0)
    for step in (0, 700, 874):
        assert losses.weights(step, 1000) == {**off, **layers}
    for step in (875, 999):
        assert losses.weights(step, 1000) == {**off, **predictions}


@pytest.mark.slow
def test_tinybert_projects_a_narrower_student_and_leaves_no_trace_of_it(tmp_path):
    student = write_model(tmp_path / "student", head="base", layers=4, hidden=12, heads=2, intermediate=24)
    local = [f"teacher.model={teacher(tmp_path)}", f"student.model={student}", glue(tmp_path, "sst2")]
    masked = write_model(tmp_path / "masked", head="masked-lm", layers=2, hidden=16, heads=2)
    local += ["distillation.max_steps=8", f"data.augment.replace.model={masked}"]
    result = distill_llm.run(load_recipe("tinybert", small("tinybert", *local)), tmp_path / "run")
    loaded = distill_llm.load_pretrained(result.student_dir)
    assert loaded.config.hidden_size == 12 and loaded.config.num_hidden_layers == 4
    assert not any("projection" in name for name in loaded.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilmv2", "mobilebert"])
def test_recipes_of_masked_language_models_run(tmp_path, name):
    model = teacher(tmp_path, head="masked-lm", hidden=48, heads=4)
    local = [f"teacher.model={model}", text(tmp_path), "distillation.gradient_accumulation_steps=2"]
    local += ["pruning.round_to=4", "distillation.max_steps=4"] if name == "mobilebert" else []
    result = distill_llm.run(load_recipe(name, small(name, *local)), tmp_path / "run")
    student = distill_llm.load_pretrained(result.student_dir)
    assert student.config.num_hidden_layers == {"minilmv2": 6, "mobilebert": 12}[name]
    if name == "mobilebert":
        assert student.get_input_embeddings().weight.shape[1] < 48
        assert result.metrics["layer_params_kept"] == pytest.approx(0.25, rel=0.05)


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
    [
        "smollm2_width",
        pytest.param("llama_width", marks=pytest.mark.slow),
        pytest.param("llama_depth", marks=pytest.mark.slow),
        pytest.param("llama_depth_width", marks=pytest.mark.slow),
        pytest.param("shortgpt", marks=pytest.mark.slow),
    ],
)
def test_decoder_recipes_run_from_text_to_a_student_that_generates(tmp_path, name):
    layers = 2 if name.endswith("2_width") or name == "llama_width" else 8
    local = [f"teacher.model={decoder(tmp_path, num_hidden_layers=layers)}", f"data.path={tmp_path / 'text.txt'}"]
    local += ["pruning.calibration_examples=8", "teacher.dtype=float32"]
    local += ["pruning.round_to=4"] if name.endswith("width") else []
    local += [] if name == "shortgpt" else ["distillation.gradient_accumulation_steps=2"]
    recipe = load_recipe(name, small(name, *local))
    metrics = distill_llm.run(recipe, tmp_path / "run").metrics
    assert metrics["metric"] == "perplexity" and metrics["retention"] > 0
    keep = recipe.pruning.keep
    assert keep - 0.25 < metrics["layer_params_kept"] <= keep * 1.01
    student = distill_llm.load_pretrained(tmp_path / "run" / "student").eval()
    assert (type(student).__name__ == "LlamaForCausalLM") == (name != "smollm2_width"), "even ones are stock"
    prompt = torch.tensor([[5, 6, 7]])
    cached = student.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    for step in range(3, cached.shape[1]):
        assert student(cached[:, :step]).logits[0, -1].argmax() == cached[0, step]


def chat_models(folder: Path) -> list[str]:
    """A teacher and a smaller student that chat, and maths in the columns of GSM8K."""
    tokenizer = word_tokenizer(pad=True)
    tokenizer.chat_template = THINKING_TEMPLATE
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 128}
    write_decoder(folder / "teacher", "qwen3", tokenizer, **sizes)
    write_decoder(folder / "student", "qwen3", tokenizer, **{**sizes, "num_hidden_layers": 1})
    rows = [json.dumps({"question": f"w{i} w{i + 1}", "answer": f"w{i + 2} w7"}) for i in range(60)]
    (folder / "maths.jsonl").write_text("\n".join(rows) + "\n")
    return [f"teacher.model={folder / 'teacher'}", f"student.model={folder / 'student'}"]


@pytest.mark.slow
def test_qwen_on_policy_lets_the_student_answer(tmp_path):
    local = [*chat_models(tmp_path), f"data.path={tmp_path / 'maths.jsonl'}", "evaluation.max_new_tokens=4"]
    local += ["distillation.losses.responses.max_new_tokens=4", "distillation.losses.responses.share=1.0"]
    result = distill_llm.run(load_recipe("qwen_on_policy", small("qwen_on_policy", *local)), tmp_path / "run")
    assert result.metrics["metric"] == "final_answer"


@pytest.mark.slow
def test_sequence_level_trains_on_what_the_teacher_answered(tmp_path):
    from distill_llm.responses.respond import respond
    from distill_llm.responses.settings import ResponseSettings

    local = chat_models(tmp_path)
    settings = ResponseSettings(
        max_new_tokens=4, temperature=0, prompt_column="question", chat=True, keep_truncated=True
    )
    respond(str(tmp_path / "teacher"), str(tmp_path / "maths.jsonl"), tmp_path / "answers", settings)
    local += [f"data.path={tmp_path / 'answers'}", "distillation.gradient_accumulation_steps=1"]
    result = distill_llm.run(load_recipe("sequence_level", small("sequence_level", *local)), tmp_path / "run")
    assert result.metrics["learned_from"] == "labels" and result.metrics["metric"] == "perplexity"


@pytest.mark.slow
def test_qlora_changes_its_student_by_little_ranks_and_saves_it_whole(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    local = [*chat_models(tmp_path), f"data.path={tmp_path / 'maths.jsonl'}", "student.peft.r=2"]
    local += ["distillation.gradient_accumulation_steps=1", "distillation.bf16=false", "teacher.dtype=float32"]
    local += ["distillation.learning_rate=0.05", "distillation.warmup_steps=0"]
    result = distill_llm.run(load_recipe("qlora", small("qlora", *local)), tmp_path / "run")
    student = distill_llm.load_pretrained(result.student_dir)
    assert not hasattr(student.config, "quantization_config")
    from distill_llm.models.quantized import load_teacher

    base = load_teacher(tmp_path / "student", "4bit", torch.float32).dequantize(dtype=torch.float32)
    before = base.state_dict()
    for name, tensor in student.state_dict().items():
        if name.endswith("proj.weight"):
            learned = torch.linalg.svdvals(tensor - before[name])
            assert learned[1] > 0.5 and learned[2] < 0.05, "of rank 2, up to rounding"
        elif "norm" in name or "embed" in name:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_script_that_its_first_line_runs(name):
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    assert path.read_text().startswith("#!/usr/bin/env -S distill-llm run\n")
    assert path.stat().st_mode & 0o111
