"""What vLLM's own converter reads of the configs of saved students: heads and KV heads of each layer.

Nothing is served: that needs CUDA. The converter is taken from vLLM's wheel, unpacked, without its package's start, which imports
the whole server. See README.md here.

    PYTHONPATH=TRANSFORMERS:VLLM:LIGHT python scripts/compat/vllm_sizes.py FOLDER ...
"""

import importlib.util
import json
import sys
import types

import transformers


def without_start(name: str) -> None:
    """Let modules of a package be imported without running the package's `__init__`."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = package


def main() -> None:
    sys.modules["distill_llm"] = None  # type: ignore[assignment]  # the code beside the weights must do
    for name in ("vllm", "vllm.config"):
        without_start(name)
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    for folder in sys.argv[1:]:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        found = ModelArchConfigConvertorBase(config, config.get_text_config()).convert()
        layers = [
            [own.get(name, getattr(found, name)) for name in ("total_num_attention_heads", "total_num_kv_heads")]
            for own in found.per_layer_overrides or [{}] * found.total_num_hidden_layers
        ]
        print(json.dumps({"folder": folder, "transformers": transformers.__version__, "heads, KV heads": layers}))
        print(found, file=sys.stderr)


if __name__ == "__main__":
    main()
