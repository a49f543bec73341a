"""Tasks for lm-evaluation-harness that need no network: questions of words with two answers each."""

import json
from pathlib import Path

import yaml

QUESTIONS = [
    {"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{(7 * i) % 80} w{i}"], "answer": i % 2}
    for i in range(12)
]


def write_benchmark(folder: Path, name: str = "choose") -> Path:
    """A folder with a task of that name, as a user would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"{name}.jsonl"
    rows.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder
