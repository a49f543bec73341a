"""Pruned models to save, and ways to spoil what was saved."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from builders.models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers

UNEVEN = ((0, (1, 3), range(5, 40)), (1, (), range(0, 64, 3)), (3, range(4), ()))
HEADS_OF = {"bert": "sequence-classification", "roberta": "masked-lm", "electra": "token-classification"}


def plan_of(model: PreTrainedModel, rows=UNEVEN) -> PruningPlan:
    return PruningPlan(model.config.model_type, tuple(LayerPlan(i, tuple(h), tuple(n)) for i, h, n in rows))


def student_of(family="bert", head="sequence-classification", **sizes) -> PreTrainedModel:
    """A pruned model that no stock config can say."""
    model = tiny_model(family, head, layers=4, **sizes)
    return prune(model, plan_of(model))


def stock_student(kind: str, family: str = "bert") -> PreTrainedModel:
    """A pruned model that a stock config can say."""
    model = tiny_model(family, layers=4)
    if kind == "layers":
        return prune(model, keep_layers(model, [0, 3]))
    return prune(model, plan_of(model, [(i, range(4), range(i, i + 40)) for i in range(4)]))


def spoil(folder: Path, how: str, name: str) -> None:
    """Make a tensor of a checkpoint missing, unexpected or of another size."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    if how == "missing":
        del weights[name]
    elif how == "unexpected":
        weights[name + "_extra"] = torch.ones(3)
    else:
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, file, {"format": "pt"})


def save_all(models: dict[str, PreTrainedModel], batch: dict, folder: Path) -> dict[str, torch.Tensor]:
    """Every model in its folder beside an input; their outputs."""
    torch.save(batch, folder / "batch.pt")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    with torch.no_grad():
        return {name: model(**batch)[0] for name, model in models.items()}


def run_elsewhere(code: str, folder: Path) -> dict:
    """What a fresh process, started in `folder`, leaves in results.pt."""
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


WITH_PACKAGE = """
import pathlib, torch
from distill_llm import load_pretrained
batch, results = torch.load("batch.pt"), {}
torch.manual_seed(123)
for path in sorted(p for p in pathlib.Path.cwd().iterdir() if (p / "config.json").exists()):
    model = load_pretrained(path)
    assert not model.training
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the place of weights in the file's memory changes how sums are rounded
    with torch.no_grad():
        results[path.name] = model(**batch)[0]
torch.save(results, "results.pt")
"""

WITHOUT_PACKAGE = """
import sys
sys.modules["distill_llm"] = None  # any import of it fails
import json, pathlib, torch, transformers
batch, results = torch.load("batch.pt"), {}
torch.manual_seed(123)
for path in sorted(p for p in pathlib.Path.cwd().iterdir() if (p / "config.json").exists()):
    config = json.loads((path / "config.json").read_text())
    name, stock = config["architectures"][0], "auto_map" not in config
    head = name.partition("For")[2] or ("CausalLM" if "LMHead" in name else "")
    auto, trust = getattr(transformers, "AutoModelFor" + head), {} if stock else {"trust_remote_code": True}
    model, info = auto.from_pretrained(path, output_loading_info=True, **trust)
    assert type(model).__name__ == name, (type(model), name)
    assert type(model).__module__.startswith("transformers.models.") == stock
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the place of weights in the file's memory changes how sums are rounded
    with torch.no_grad():
        results[path.name] = model(**batch)[0]
    model.save_pretrained(path.parent / (path.name + "-again"))
assert not any(name.startswith("distill_llm") and module for name, module in sys.modules.items())
torch.save(results, "results.pt")
"""
