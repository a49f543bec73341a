"""Recipes with faults: shipped ones, changed at random as text or as a tree, must load or be refused in lines, within seconds.

A refusal is an `InputError`; any other exception is a traceback. A recipe that loads must also read back equal from the YAML
that a run folder keeps. `--door` recipes name a tiny model and rows of this machine, and go through all checks that come before
a run's work.

    python scripts/bench/reliability_recipes.py --count 5000 --door 1000 --seed 0
"""

import argparse
import copy
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from builders.recipes import recipe_for, write_model, write_rows

from distill_llm.checks.recipe import open_recipe
from distill_llm.common.errors import LONGEST_LINE, InputError, faults_in
from distill_llm.recipe.recipe import load_recipe, recipe_folder, recipe_names

LIMIT = 5.0
"""Seconds that a recipe may take."""
PIECES = [
    ":", "-", "  ", "\t", "\n", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!!set ", "!x ", "? ", "<<: ", "|", ">", "#", '"', "'",
    "%", "\0", "\ud800", "é", "on", "null", "~", "2020-13-45", "0x_", "1e999", ".nan", "9" * 5000, "[" * 2000,
    "---\n", "a: &b [*b]\n",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -0.5, 1e30, 2**40, 10**30, float("nan"), float("inf"), "", " ", "x", "yes",
    "a\0b", "\ud800", "x" * 5000, "../" * 50, "/dev/null", "./no/such", "owner/name", "package://x", "cola", "5e-5",
    [], {}, [1], [None], {"a": 1}, {1: 2}, [[0, 1]], ["heads", "heads"], {"weight": -1}, "no", "text", "prompts",
    "regression",
]  # fmt: skip


def mutated_text(text: str, random_: random.Random) -> str:
    """The text after one, two or four changes of characters or lines."""
    for _ in range(random_.choice((1, 1, 2, 4))):
        at, end = sorted(random_.randrange(len(text) + 1) for _ in range(2))
        lines = text.split("\n")
        one, other = random_.randrange(len(lines)), random_.randrange(len(lines))
        match random_.randrange(6):
            case 0:
                text = text[:at] + random_.choice(PIECES) + text[at:]
            case 1:
                text = text[:at] + text[min(end, at + random_.randint(1, 20)) :]
            case 2:
                lines[one], lines[other] = lines[other], lines[one]
                text = "\n".join(lines)
            case 3:
                text = "\n".join([*lines[:one], lines[other], *lines[one:]])
            case 4:
                lines[one] = " " * random_.randint(0, 6) + lines[one].lstrip()
                text = "\n".join(lines)
            case 5:
                key, colon, _ = lines[one].partition(":")
                lines[one] = f"{key}{colon} {random_.choice(PIECES)}"
                text = "\n".join(lines)
    return text


def mutated_tree(tree: dict[str, Any], random_: random.Random) -> str:
    """The tree after one, two or four changes of names or values, as YAML."""
    tree = copy.deepcopy(tree)
    for _ in range(random_.choice((1, 1, 2, 4))):
        places = [
            (holder, key)
            for holder in _holders(tree)
            for key in (holder if isinstance(holder, dict) else range(len(holder)))
        ]
        if not places:
            break
        holder, key = random_.choice(places)
        match random_.randrange(5):
            case 0:
                del holder[key]
            case 1 | 2:
                holder[key] = copy.deepcopy(random_.choice(VALUES))
            case 3 if isinstance(holder, dict):
                name = random_.choice([f"{key}s", str(key)[:-1], 1, True, None, "model", "losses", "path", ""])
                holder[name] = holder.pop(key)
            case _:
                other, place = random_.choice(places)
                holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else (other or [None])[0])
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)


def _holders(tree: Any) -> list[Any]:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return ([tree] if isinstance(tree, dict | list) else []) + [found for each in inner for found in _holders(each)]


def _load(file: Path) -> None:
    recipe = load_recipe(file)
    written = file.with_name("again.yaml")
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(written).model_dump_json() == recipe.model_dump_json(), "reads back unequal"


def _open(file: Path) -> None:
    open_recipe(load_recipe(file))


def outcome(check: Callable[[Path], None], file: Path) -> str:
    """`accepted`, `refused`, or what went wrong."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"over {LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        check(file)
    except InputError as error:
        lines = [str(fault) for fault in faults_in(error)]
        return "refused" if all(len(line.splitlines()) == 1 and len(line) <= LONGEST_LINE for line in lines) else "long"
    except Exception as error:
        places = [f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__}: {str(error)[:100]!r} at {' < '.join(places[::-1][:4])}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted"


def main() -> int:
    """Make and try the recipes; the number of those that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--door", type=int, default=1000, help="how many of them go through all checks of a run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="recipes-"))
    os.chdir(folder)
    write_model(folder / "teacher", max_position_embeddings=160)
    write_rows(folder / "rows.csv")
    texts = [(recipe_folder() / f"{name}.yaml").read_text() for name in recipe_names()]
    here = yaml.safe_dump(recipe_for(Path()))
    random_, counts, wrong, slowest = random.Random(options.seed), Counter(), Counter(), 0.0
    for number in range(options.count):
        door = number < options.door
        text = here if door else random_.choice(texts)
        kind = random_.choice(("text", "tree"))
        changed = mutated_text(text, random_) if kind == "text" else mutated_tree(yaml.safe_load(text), random_)
        file = folder / "recipe.yaml"
        file.write_bytes(changed.encode("utf-8", "surrogatepass"))
        started = time.perf_counter()
        found = outcome(_open if door else _load, file)
        slowest = max(slowest, time.perf_counter() - started)
        if found not in ("accepted", "refused"):
            wrong[found] += 1
            (folder / f"wrong-{number}.yaml").write_bytes(file.read_bytes())
            found = "wrong"
        counts["door" if door else "reading", kind, found] += 1
    print(
        "| checked by | changed as | accepted | refused in lines | tracebacks, hangs, long lines |\n|---|---|---|---|---|"
    )
    for check in ("reading", "door"):
        for kind in ("text", "tree"):
            cells = [counts[check, kind, found] for found in ("accepted", "refused", "wrong")]
            print(f"| {check} | {kind} | {' | '.join(map(str, cells))} |")
    print(f"\nslowest {slowest:.1f} s; seed {options.seed}; files of what went wrong: {folder}")
    for found, times in wrong.most_common():
        print(f"{times} x {found}")
    return sum(wrong.values())


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
