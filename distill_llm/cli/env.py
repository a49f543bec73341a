"""`distill-llm env`: what a bug report needs to say of a machine."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from distill_llm.cli.output import say

EXAMPLE = "Example: distill-llm env"
VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
"""Environment variables that change what happens."""


def env() -> None:
    """Show versions, devices and memory, to paste into a bug report."""
    import psutil
    import torch

    here, memory = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else (), psutil.virtual_memory()
    cores = f"{os.cpu_count()} ({len(here)} for this process)" if here else str(os.cpu_count())
    found, missing = _packages()
    facts = {
        "distill_llm": version("distill_llm"),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        **found,
        "cores": f"{cores}, torch uses {torch.get_num_threads()} threads",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free",
        "devices": ", ".join(_devices()),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    for name, value in facts.items():
        say(f"- {name}: {value}")
    for extra, packages in missing.items():
        say(f"- not installed: {', '.join(packages)} (pip install 'distill_llm[{extra}]')")


def _packages() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Versions of the packages that distill_llm and its extras need; and, by extra, those that are missing."""
    found: dict[str, str] = {}
    missing: dict[str, list[str]] = {}
    for line in requires("distill_llm") or []:
        match = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if match is None or "[" in line.partition(";")[0] or (extra and extra[1] in ("dev", "docs")):
            continue
        try:
            found[match[0]] = version(match[0])
        except PackageNotFoundError:
            missing.setdefault(extra[1] if extra else "", []).append(match[0])
    return found, missing


def _devices() -> list[str]:
    """The accelerators with their memory, or the CPU."""
    import torch

    from distill_llm.measuring.profiling import device_name

    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        names = [f"cuda:{i} {device_name(f'cuda:{i}')}, {size / 1e9:.0f} GB" for i, size in enumerate(sizes)]
        return [*names, f"CUDA {torch.version.cuda}"]
    if torch.accelerator.is_available():
        return [device_name(str(torch.accelerator.current_accelerator()))]
    return [device_name("cpu")]
