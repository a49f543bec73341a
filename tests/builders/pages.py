"""A report.html with every part that a page can have."""

from pathlib import Path
from typing import Any

from builders.reports import metrics, student_folder

from distill_llm.report import write_page

HISTORY = {
    "teacher": {"steps": [1, 2], "losses": {"loss": [0.9, 0.5], "loss/labels": [0.9, 0.5]}},
    "round-1/recover": {
        "steps": [2, 4],
        "losses": {"loss": [0.8, 0.4], "loss/logits": [0.02, 0.01], "loss/$x<b>$": [None, 3.0]},
    },
}
GRID = [
    {"batch_size": size, "sequence_length": length, "model_ms": 2.0 * size, "other_ms": 5.0 * size, "speedup": 2.5}
    for size, length in ((1, 16), (1, 32), (8, 16))
]
HOSTILE = "<script>alert(1)</script> \"quoted\" 'single' & https://x.example/a.png 🙂 \u202eשלום \x00\ud800"
EXAMPLES: dict[str, Any] = {
    "rows": 1234,
    "agreement": 0.875,
    "examples": [
        {
            "row": 3,
            "distance": 0.7,
            "truth": "<b>bad</b>",
            "teacher": {"says": "bad", "share": 0.912},
            "student": {"says": "good", "share": 0.634},
            "text": HOSTILE,
        }
    ],
}
RECIPE = "description: a test\nteacher:\n  model: /secret/place/big\noutput_dir: /secret/runs/x\n"


def page_of(folder: Path, shown: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The page for `metrics` with some keys replaced."""
    student_folder(folder / "student")
    return write_page(folder, metrics(**changes), shown or {}, RECIPE)


def full_page(folder: Path) -> Path:
    """A page with all parts, and with long words in them."""
    long = "a" * 400
    example = {**EXAMPLES["examples"][0], "text": long, "truth": long[:60]}
    plan = [{**row, "heads_kept": [0, 2, 3][: row["heads"]]} for row in metrics()["plan_layers"]]
    return page_of(
        folder,
        {**EXAMPLES, "examples": [*EXAMPLES["examples"], example]},
        history=HISTORY,
        latency_grid=GRID,
        stages={"teacher": 61.0, "round-1/prune": 9.25},
        seed=7,
        plan_layers=plan,
        plan_hidden={"kept": 300, "of": 384},
        teacher={**metrics()["teacher"], "layers": 4},
        teacher_model=f"owner/{long[:90]}",
        warnings=[long],
        device=f"{long[:80]}, 2 threads",
    )
