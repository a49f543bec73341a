"""What one of several processes has learned beside a generator: saved as FOLDER/RANK.pt.

Usage: generate_in_processes.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from builders.generating import trained

folder = Path(sys.argv[1])
torch.save(trained(folder / "two"), folder / f"{os.environ['RANK']}.pt")
