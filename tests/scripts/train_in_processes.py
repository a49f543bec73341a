"""What one of several processes has learned: saved as FOLDER/RANK.pt.

Usage: train_in_processes.py FOLDER CASES, where CASES is JSON: [[head, width of the student, [name, ...]], ...]
"""

import json
import os
import sys
from pathlib import Path

import torch
from builders.learning import learned

folder = Path(sys.argv[1])
torch.save(learned(folder, json.loads(sys.argv[2])), folder / f"{os.environ['RANK']}.pt")
