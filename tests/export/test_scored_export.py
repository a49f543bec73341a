"""`evaluate` and `profile` on the folder of an ONNX export, beside the folder that it was made from."""

import json
from pathlib import Path

import pytest
import torch
from builders.exports import llama_kind, save
from builders.models import tiny_model
from builders.texts import make_tokenizer
from typer.testing import CliRunner

from distill_llm import prune
from distill_llm.architectures.lineage import LayerPlan
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.export import export
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.exported import load_export
from distill_llm.models.finding import open_model
from distill_llm.pruning.plan import PruningPlan

WORDS = ("cat", "mats", "the", "lines", "two", "naive")


def scores(model: Path, *options: str) -> dict[str, float]:
    """What `evaluate` saves, without the names of model and task."""
    output = model.parent / f"{model.name}.json"
    done = CliRunner().invoke(app, ["evaluate", str(model), "--output", str(output), *options])
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text())


@pytest.mark.slow
def test_a_decoder_scores_and_answers_as_the_model_it_was_made_from(tmp_path: Path) -> None:
    """Prompts of several lengths, so that some batches are padded and others are not; layers without heads or neurons."""
    model = llama_kind(num_hidden_layers=2)
    plan = PruningPlan("llama", [LayerPlan(0, (0,), range(48)), LayerPlan(1, (), range(16))])
    folder = save(prune(model, plan), tmp_path / "student")
    rows = [{"prompt": " ".join(WORDS[i % 6 :][: 1 + i % 4]), "response": WORDS[i % 5]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--task", "prompts", "--data", str(tmp_path / "rows.jsonl"), "--batch-size", "3"]
    options += ["--metric", "exact_match"]
    wanted, found = (scores(each, *options) for each in (folder, export(folder, "onnx").path))
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    graph, model = load_export(tmp_path / "student-onnx-f32"), load_pretrained(folder)
    for mask in ([[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]]):
        given = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 3, 4, 5]]), "attention_mask": torch.tensor(mask)}
        answers = [each.generate(**given, max_new_tokens=8, do_sample=False).tolist() for each in (graph, model)]
        assert answers[0] == answers[1]
    with pytest.raises(InputError, match="^position_ids: got 'packed rows'"):
        graph(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))


@pytest.mark.slow
def test_a_classifier_scores_the_same_and_is_profiled_beside_its_model(tmp_path: Path) -> None:
    rows = [LayerPlan(0, (0, 2, 3), range(40)), LayerPlan(2, (), range(10))]
    folder = tmp_path / "student"
    save(
        prune(tiny_model("bert", "sequence-classification", vocab=len(make_tokenizer())), PruningPlan("bert", rows)),
        folder,
        make_tokenizer(),
    )
    lines = "\n".join(f"{WORDS[i % 6]} {WORDS[i % 5]},{i % 2}" for i in range(30))
    (tmp_path / "rows.csv").write_text(f"text,label\n{lines}\n")
    options = ["--task", "classification", "--data", str(tmp_path / "rows.csv"), "--max-length", "32"]
    graph = export(folder, "onnx").path
    assert scores(graph, *options)["score"] == scores(folder, *options)["score"]
    shown = CliRunner().invoke(app, ["profile", str(graph), "--against", str(folder), "--batch-size", "2"])
    assert shown.exit_code == 0 and "not known" in shown.output and "speed-up, paired" in shown.output
    with pytest.raises(InputError, match="name the folder that it was exported from"):
        open_model("teacher.model", str(graph))
    (graph / "model.onnx").unlink()
    refused = CliRunner().invoke(app, ["profile", str(graph)])
    assert refused.exit_code == 2 and "model.onnx is missing" in " ".join(refused.output.split())
