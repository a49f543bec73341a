"""What a run survives: kills, full disks, a second command in its folder, damaged files.

    python scripts/bench/reliability.py                   # a few trials of each kind
    python scripts/bench/reliability.py --full            # the counts of RELIABILITY.md
    python scripts/bench/reliability.py --kinds files --trials 500 --seed 3

Every trial is the real command line in a process of its own, forked from this one, which has imported everything and computed
nothing. A trial passes if no traceback was printed and the student in the end has the very bits of an undisturbed run's.
Where that cannot be, it passes if the command said so in one line and left all other files as they were. Linux alone: trials
use fork and prlimit. TMPDIR=/dev/shm saves waiting for the disk.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
HOME = Path(tempfile.mkdtemp(prefix="reliability-"))
os.environ["HF_DATASETS_CACHE"] = str(HOME / "datasets")

import torch  # noqa: E402 - the environment comes first
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer  # noqa: E402

from distill_llm.cli.main import app  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "not", "very", "the"]
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 2}
MODELS = ("teacher", "round-1/student", "round-2/student", "student")
COUNTS = {"kills": (3, 30), "disks": (3, 20), "pairs": (4, 20), "files": (20, 500)}


@dataclass
class Outcome:
    """How a trial ended: `same`, `line` or `fault`, and in words what went wrong."""

    how: str
    words: str = ""


@dataclass
class Child:
    """A command in a process of its own."""

    pid: int
    reading: int
    text: bytes = b""
    code: int | None = field(default=None)

    def wait(self) -> "Child":
        """Read what it prints until it ends."""
        while part := os.read(self.reading, 1 << 16):
            self.text += part
        os.close(self.reading)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self

    def lines(self) -> list[str]:
        """The lines of its errors."""
        return [line for line in self.text.decode(errors="replace").splitlines() if line.startswith("error: ")]


def start(*arguments: str, work: Callable[[], None] | None = None) -> Child:
    """Start `distill-llm ARGUMENTS`, or other work."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    if pid := os.fork():
        os.close(writing)
        return Child(pid, reading)
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    code = 1
    try:
        work() if work else app(list(arguments), prog_name="distill-llm")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write_inputs(home: Path) -> None:
    """A tiny BERT with its tokenizer, rows that can be learnt, and a recipe of two rounds."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)
    config.id2label, config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    BertForSequenceClassification(config).save_pretrained(home / "model")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(home / "model")
    drawn = random.Random(0)
    texts = [drawn.choices(WORDS[5:], k=drawn.randint(2, 12)) for _ in range(48)]
    rows = [f"{' '.join(text)},{'pos' if 'good' in text else 'neg'}" for text in texts]
    (home / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    recipe = {
        "teacher": {"model": str(home / "model"), "train": TRAINING},
        "data": {"task": "classification", "path": str(home / "rows.csv"), "max_length": 16},
        "pruning": {"keep": 0.5, "rounds": 2, "calibration_examples": 8},
        "distillation": {"losses": {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}, "hidden": {}}, **TRAINING},
        "evaluation": {"latency": {"batch_size": 2, "sequence_length": 8}},
    }
    (home / "recipe.yaml").write_text(json.dumps(recipe))


def hashes(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Trials:
    """Trials of one kind after another, each with a random generator of its own."""

    def __init__(self, seed: int):
        self.seed, self.recipe = seed, str(HOME / "recipe.yaml")
        modules = HOME / "modules"

        def first() -> None:
            write_inputs(HOME)
            with suppress(SystemExit):
                app(["run", self.recipe, "--output-dir", str(HOME / "first")])
            modules.write_text("\n".join(sys.modules))

        self._must(start(work=first))
        for name in modules.read_text().split("\n"):  # what a run imports late
            with suppress(Exception):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # so that children do not copy all of this when they collect garbage
        begun = time.monotonic()
        self._must(self.run(HOME / "whole"))
        self.seconds, self.whole = time.monotonic() - begun, self.weights(HOME / "whole")
        self.score = json.loads((HOME / "whole" / "metrics.json").read_text())["student"]["score"]
        self._must(self.prune(HOME / "whole-pruned"))
        self.pruned = hashes(HOME / "whole-pruned")["model.safetensors"]

    def _must(self, child: Child) -> None:
        child = child.wait()
        assert child.code == 0, child.text.decode(errors="replace")[-3000:]

    def run(self, folder: Path, *settings: str) -> Child:
        """The run, in a folder."""
        return start("run", self.recipe, "--output-dir", str(folder), *settings)

    def prune(self, folder: Path, *settings: str) -> Child:
        """Pruning alone."""
        data = ("--task", "classification", "--data", str(HOME / "rows.csv"), "--max-length", "16")
        sizes = ("evaluation.latency.batch_size=2", "evaluation.latency.sequence_length=8")
        sets = [part for each in (*sizes, *settings) for part in ("--set", each)]
        return start(
            "prune",
            str(HOME / "model"),
            *data,
            "--keep",
            "0.5",
            "--calibration-examples",
            "8",
            "--output-dir",
            str(folder),
            *sets,
        )

    def weights(self, folder: Path) -> dict[str, str]:
        """Hashes of the weights that a run leaves."""
        files = {name: folder / name / "model.safetensors" for name in MODELS}
        return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}

    def ended(self, child: Child, folder: Path) -> Outcome:
        """How a run that was to end well did so."""
        text = child.text.decode(errors="replace")
        if "Traceback" in text or child.code not in (0, 2):
            return Outcome("fault", f"exit {child.code}: {text[-1500:]}")
        if child.code == 2:
            lines = child.lines()
            is_one = len(lines) == 1 and len(lines[0]) < 1000
            return Outcome("line" if is_one else "fault", " | ".join(lines) or text[-1500:])
        try:
            score = json.loads((folder / "metrics.json").read_text())["student"]["score"]
        except (OSError, ValueError, LookupError) as error:
            return Outcome("fault", f"metrics.json: {error}")
        student = self.weights(folder).get("student")
        if student != self.whole["student"] or score != self.score:
            return Outcome("fault", f"another student: {student}, score {score}")
        left = [
            str(path.relative_to(folder))
            for pattern in ("*.partial", "*-training", ".*lock")
            for path in folder.rglob(pattern)
        ]
        return Outcome("fault", f"left behind: {left}") if left else Outcome("same")

    def kills(self, drawn: random.Random, folder: Path) -> Outcome:
        """Kill the run at one to three random moments, then let it end."""
        for _ in range(drawn.choice([1, 1, 2, 3])):
            child = self.run(folder)
            time.sleep(drawn.uniform(0.1, 1) * self.seconds)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        found = self.ended(self.run(folder).wait(), folder)
        if found.how == "same" and self.weights(folder) != self.whole:
            return Outcome("fault", "another teacher or student of a round")
        return found if found.how != "line" else Outcome("fault", found.words)

    def disks(self, drawn: random.Random, folder: Path) -> Outcome:
        """Let the disk fill up at a random moment, so that the run fails; make room, and let it end."""
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            with small_disk(folder, drawn.random() < 0.5) as fill:
                child = self.run(folder)
                time.sleep(drawn.uniform(0.05, 0.9) * self.seconds)
                room = fill(child.pid, drawn)
                first = self.ended(child.wait(), folder)
                if first.how == "same":
                    continue  # it was done before
                named = first.how == "line" and str(folder) in first.words
                partial = [str(path) for path in folder.rglob("*.partial")]
                room()
                if not named or partial:
                    return Outcome("fault", f"{first.words}; {partial}")
                found = self.ended(self.run(folder).wait(), folder)
                return found if found.how != "line" else Outcome("fault", found.words)
        return Outcome("fault", "never full in time")

    def pairs(self, drawn: random.Random, folder: Path) -> Outcome:
        """Start two commands on one folder, or on one file of statistics, at nearly the same time."""
        kind = drawn.choice(["run", "run", "prune", "statistics"])
        make, settings = (self.run, []) if kind == "run" else (self.prune, [])
        folders = [folder, folder]
        if kind == "statistics":
            settings, folders = (
                [f"pruning.statistics={folder}.safetensors"],
                [folder.with_name(f"{folder.name}-{i}") for i in (1, 2)],
            )
        first = make(folders[0], *settings)
        time.sleep(drawn.uniform(0, 0.3) * self.seconds * (kind == "run"))
        two = [make(folders[1], *settings), first]
        texts = [each.wait().text.decode(errors="replace") for each in two]
        codes = sorted(str(each.code) for each in two)
        lines = [line for each in two for line in each.lines()]
        wanted = ["0", "0"] if kind == "statistics" else ["0", "2"]
        if any("Traceback" in text for text in texts) or codes != wanted or len(lines) != (kind != "statistics"):
            return Outcome("fault", f"{kind} {codes}: {' '.join(texts)[-1500:]}")
        if kind == "run":
            return Outcome("same") if self.weights(folder) == self.whole else Outcome("fault", "another student")
        right = all(hashes(each)["model.safetensors"] == self.pruned for each in folders)
        return Outcome("same") if right else Outcome("fault", f"{kind}: another model")

    def files(self, drawn: random.Random, folder: Path) -> Outcome:
        """Damage a random file of a finished run, or of one that was stopped; then the same command."""
        shutil.copytree(HOME / drawn.choice(["whole", "whole", "stopped"]), folder)
        file = drawn.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        name, content = str(file.relative_to(folder)), file.read_bytes()
        how = drawn.choice(["cut", "flip", "delete", "empty"])
        if how == "delete":
            file.unlink()
        else:
            file.write_bytes(damaged(content, how, drawn))
        before = hashes(folder)
        found = self.ended(self.run(folder).wait(), folder)
        if found.how == "line":
            now = hashes(folder)
            own = {
                name,
                "recipe.yaml",
                "state.json",
                "state.backup.json",
            }  # a copy is written anew: its folder has another name
            lost = [each for each in before if each not in own and now.get(each) != before[each]]
            found = Outcome("fault", f"lost {lost}: {found.words}") if lost else found
        return Outcome(found.how, f"{how} {name}: {found.words}" if found.words else "")

    def stop_one(self) -> None:
        """A run that was killed in the training of its last round, with checkpoints."""
        folder = HOME / "stopped"
        child = self.run(folder)
        while not list(folder.glob("round-2/student-training/checkpoint-*/complete.json")):
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()


def damaged(content: bytes, how: str, drawn: random.Random) -> bytes:
    """A file's content, cut at a random place, with up to eight bits turned, or nothing."""
    if how == "empty" or not content:
        return b""
    if how == "cut":
        return content[: drawn.randrange(len(content))]
    turned = bytearray(content)
    for _ in range(drawn.randint(1, 8)):
        turned[drawn.randrange(len(turned))] ^= 1 << drawn.randrange(8)
    return bytes(turned)


@contextmanager
def small_disk(folder: Path, own: bool) -> Iterator[Callable[[int, random.Random], Callable[[], None]]]:
    """What fills the disk of a folder, and returns what makes room again.

    With `own` it is a file system of its own that really fills up, where one can be mounted; else the process may not write
    files above a random size, which needs no rights.
    """
    folder.mkdir()
    mounted = own and os.system(f"mount -t tmpfs -o size=64m tmpfs {folder} 2>/dev/null") == 0

    def fill(pid: int, drawn: random.Random) -> Callable[[], None]:
        if not mounted:
            with suppress(ProcessLookupError):
                size = drawn.choice([0, 100, 1 << 12, 1 << 15])
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return lambda: None
        filler = folder / "filler.partial.txt"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        return filler.unlink

    try:
        yield fill
    finally:
        if mounted:
            os.system(f"umount {folder}")


def main() -> None:
    """Carry out trials, and print faults, a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--trials", type=int, help="number of trials of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to go on in pieces")
    parser.add_argument("--full", action="store_true", help="the counts of RELIABILITY.md")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trials, results = Trials(options.seed), {}
    if "files" in options.kinds:
        trials.stop_one()
    for kind in options.kinds:
        found: Counter[str] = Counter()
        words: list[str] = []
        for number in range(options.first, options.first + (options.trials or COUNTS[kind][options.full])):
            folder = HOME / f"{kind}-{number}"
            outcome = getattr(trials, kind)(random.Random(f"{options.seed} {kind} {number}"), folder)
            found[outcome.how] += 1
            if outcome.words:
                words.append(outcome.words)
                print(f"{kind} {number}: {outcome.how}: {outcome.words.replace(str(HOME), '')}", flush=True)
            for left in HOME.glob(f"{folder.name}*"):
                shutil.rmtree(left, ignore_errors=True)
        results[kind] = {"trials": found.total(), **found}
    print(json.dumps({"seed": options.seed, "seconds_of_a_run": round(trials.seconds, 1), **results}))
    shutil.rmtree(HOME, ignore_errors=True)
    sys.exit(any(each.get("fault") for each in results.values()))


if __name__ == "__main__":
    main()
