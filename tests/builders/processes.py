"""Scripts in processes of their own: one, or several that train together."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "scripts"


def environment(**variables: str) -> dict[str, str]:
    """One thread, no accelerator, no Hub; this package and the builders can be imported."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own, **variables}


def command(*arguments: object, processes: int = 1) -> list[str]:
    """The command line of Python, or of torch's launcher where there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]


class Started:
    """A running script of tests/scripts, of which `output` waits for the end."""

    def __init__(self, script: str, *arguments: object, processes: int = 1, **variables: str):
        line = command(SCRIPTS / script, *arguments, processes=processes)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, env=environment(**variables), stdout=pipe, stderr=pipe, text=True)

    def output(self, timeout: float = 300) -> str:
        """What it printed. Raises AssertionError, with the end of its error output, where it fails."""
        try:
            printed, errors = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        assert self.process.returncode == 0, errors[-6000:]
        return printed


def run_script(script: str, *arguments: object, processes: int = 1, **variables: str) -> str:
    """What a script of tests/scripts prints."""
    return Started(script, *arguments, processes=processes, **variables).output()


def run_recipe(file: Path, out: Path, options: tuple[str, ...] = (), *settings: str) -> subprocess.Popen:
    """`distill-llm run` as a process of its own; what it prints, errors too, is in its standard output."""
    sets = [part for setting in settings for part in ("--set", setting)]
    line = [sys.executable, "-m", "distill_llm", "run", str(file), "--output-dir", str(out), *options, *sets]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
