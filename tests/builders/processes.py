"""Scripts in processes of their own: one, or several that train together."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

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


def fork(work: Callable[[int], object], processes: int = 2, timeout: float = 300, **variables: str) -> None:
    """Call `work` with its rank in processes that train together, which begin with all that is imported here.

    Torch's launcher starts each from nothing, which takes them longer than a small training. Not where there is an accelerator:
    its threads do not survive a fork.

    Raises:
        AssertionError: one of them fails, or does not end in time.
    """
    assert not torch.accelerator.is_available(), "use run_script"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **sizes, **variables}
    running, deadline = set(), time.monotonic() + timeout
    for rank in range(processes):
        if not (child := os.fork()):
            _end_after(work, rank, group)
        running.add(child)
    try:
        while running:
            assert time.monotonic() < deadline, "the processes do not end"
            for child in list(running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    running.discard(child)
                    assert status == 0, "a process failed: see its traceback in the error output"
            time.sleep(0.02)
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _end_after(work: Callable[[int], object], rank: int, group: dict[str, str]) -> None:
    """In a process of its own: do the work as one of a group, and end."""
    status = 1
    try:
        os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)  # this process was the only one before
        GradientState._reset_state()
        work(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
