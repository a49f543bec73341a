"""The run of FOLDER/own.yaml, in FOLDER/run-PROCESSES; its student is sharded where the environment asks for it.

Usage: run_sharded.py FOLDER
"""

import os
import sys
from pathlib import Path

from builders.sharding import shard_on_processors

import distill_llm
from distill_llm.recipe.recipe import load_recipe

folder = Path(sys.argv[1])
if os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    shard_on_processors()
distill_llm.run(load_recipe(str(folder / "own.yaml")), folder / f"run-{os.environ.get('WORLD_SIZE', '1')}")
