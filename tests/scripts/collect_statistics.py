"""Statistics that each of several processes has collected: saved as FOLDER/two-RANK-CASE.safetensors.

Usage: collect_statistics.py FOLDER
"""

import sys

import torch.distributed as dist
from builders.calibration import CASES, statistics_of

dist.init_process_group("gloo")
for case in CASES:
    statistics_of(case).save(f"{sys.argv[1]}/two-{dist.get_rank()}-{case}.safetensors")
