"""Saved students opened by other versions of transformers, by the code beside their weights: the same logits to the last bit?

With this package, `save FOLDER` makes uneven students and what they give. Then each version, without this package, runs `check`:

    python scripts/compat/transformers_versions.py save FOLDER
    pip install --target TF --no-deps transformers==5.16.1
    PYTHONPATH=TF python scripts/compat/transformers_versions.py check FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import transformers

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
GROUPS = {"num_key_value_heads": 2, "head_dim": 16}
FAMILIES = {
    "llama": GROUPS,
    "mistral": GROUPS | {"sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": GROUPS,
    "gemma2": GROUPS | {"pad_token_id": 0},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {},
    "bert": {},
    "roberta": {},
    "distilbert": {},
    "modernbert": {"pad_token_id": 0},
}


def batch() -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second padded at its end."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def save(folder: Path) -> None:
    """Uneven students of every family, the first layer's attention whole, one layer without attention, one without FFN."""
    from distill_llm import prune
    from distill_llm.architectures.families import dims_of
    from distill_llm.architectures.lineage import LayerPlan
    from distill_llm.pruning.plan import PruningPlan

    for name, own in FAMILIES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **SIZES, **own)
        causal = name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in (
            "bert",
            "roberta",
        )
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
        model = auto.from_config(config).eval()
        groups = dims_of(model.config).groups
        rows = [
            LayerPlan(0, range(groups), range(48)),
            LayerPlan(1, (), range(32)),
            LayerPlan(2, (0,), ()),
            LayerPlan(3, (groups - 1,), range(8, 64)),
        ]
        student = prune(model, PruningPlan(name, rows)).eval()
        student.save_pretrained(folder / name)
        with torch.inference_mode():
            torch.save((auto.__name__, student(**batch()).logits), folder / name / "logits.pt")


def check(folder: Path) -> None:
    """Open each of them without this package and print whether its logits are the same."""
    sys.modules["distill_llm"] = None  # type: ignore[assignment]
    found = {}
    for path in sorted(folder.iterdir()):
        auto, wanted = torch.load(path / "logits.pt")
        try:
            model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True).eval()
            with torch.inference_mode():
                logits = model(**batch()).logits
            found[path.name] = "equal" if torch.equal(logits, wanted) else f"{(logits - wanted).abs().max():.1e}"
        except Exception as error:  # each version fails in its own way
            found[path.name] = f"{type(error).__name__}: {str(error)[:100]}"
    print(json.dumps({"transformers": transformers.__version__, "logits": found}))


if __name__ == "__main__":
    {"save": save, "check": check}[sys.argv[1]](Path(sys.argv[2]))
