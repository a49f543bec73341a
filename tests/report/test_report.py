"""report.md and its figures: there, complete, and every link in it leads somewhere."""

import re
from pathlib import Path

import pytest
from builders.disks import fill_disk
from builders.reports import metrics, student_folder
from matplotlib.image import imread

from distill_llm.common.errors import InputError
from distill_llm.report import write_report
from distill_llm.report.figures import kept_figure, score_figure


def test_report_has_table_rounds_figures_and_how_to_load(tmp_path: Path) -> None:
    student_folder(tmp_path / "student", auto_map={"AutoModel": "modeling_pruned.X"})
    path = write_report(tmp_path, metrics())
    text = path.read_text()
    assert path == tmp_path / "report.md"
    assert text.startswith("# teacher-model, pruned and distilled on sst2\n")
    assert (
        "keeps 99.5% of its teacher's accuracy, has 50.0% of the parameters of its teacher's layers and runs 1.90 times"
        in text
    )
    assert "| recovered" in text and "## Rounds" in text
    assert "Test CPU, 2 threads on batches of 32 x 64 tokens" in text
    assert "Models were scored and measured with weights in bfloat16. The columns" in text
    assert "from_pretrained(model_id, trust_remote_code=True)" in text
    assert "torch 2.13.0, transformers 5.23.0; the run took 7 min 0 s." in text
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert links == ["figures/scores.png", "figures/kept.png"]
    for link in links:
        height, width, _ = imread(tmp_path / link).shape
        assert width > height > 200


def test_report_of_a_student_that_was_never_pruned_leaves_out_rounds_and_figures(tmp_path: Path) -> None:
    student_folder(tmp_path / "student")
    text = write_report(tmp_path, metrics(rounds=[], plan_layers=[])).read_text()
    assert text.startswith("# teacher-model, distilled on sst2\n")
    assert "![" not in text and "## Rounds" not in text and "trust_remote_code" not in text
    assert not (tmp_path / "figures").exists()


def test_report_says_how_strongly_every_round_was_compensated(tmp_path: Path) -> None:
    student_folder(tmp_path / "student")
    rounds = [dict(row) for row in metrics()["rounds"]]
    divergence = {"none": 0.5, "1": 0.125, "0.1": 0.25}
    rounds[0]["compensation"] = [{"ridge": 1.0, "rows": 256, "divergence": divergence}]
    rounds[1]["compensation"] = [{"ridge": None, "rows": 256, "divergence": divergence}]
    text = write_report(tmp_path, metrics(rounds=rounds)).read_text()
    said = "divergence on 256 held-out rows 0.5 without, 0.125 with it."
    assert f"Round 1: compensated with ridge 1: {said}" in text and f"Round 2: no compensation: {said}" in text


def test_a_full_disk_leaves_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student_folder(tmp_path / "student")
    before = write_report(tmp_path, metrics(rounds=[], plan_layers=[])).read_text()
    fill_disk(monkeypatch)
    with pytest.raises(InputError, match="^disk: got .*: No space"):
        write_report(tmp_path, metrics(rounds=[], plan_layers=[], task="mrpc"))
    assert (tmp_path / "report.md").read_text() == before and not list(tmp_path.glob("*.partial"))


def test_report_needs_a_student(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="student_dir"):
        write_report(tmp_path, metrics())


def test_score_figure_has_a_mark_for_every_score_and_the_teachers_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("distill_llm.report.figures.save", lambda figure, path: drawn.append(figure))
    score_figure(metrics(), tmp_path / "x.png")
    axes = drawn[0].axes[0]
    marks = {c.get_label(): [y for _, y in c.get_offsets().tolist()] for c in axes.collections}
    assert marks == {"pruned": [0.78, 0.7], "compensated": [0.79, 0.76], "recovered": [0.8, 0.796]}
    assert set(axes.lines[0].get_ydata()) == {0.8}


def test_kept_figure_draws_kept_over_original_with_an_empty_bar_for_a_removed_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("distill_llm.report.figures.save", lambda figure, path: drawn.append(figure))
    given = metrics()
    given["teacher"]["layers"] = 4
    kept_figure(given, tmp_path / "x.png")
    bars = [[[bar.get_width() for bar in group] for group in axes.containers] for axes in drawn[0].axes]
    assert bars[0] == [[4, 4, 4, 4], [3, 0, 0, 0]]
    assert bars[1] == [[64, 64, 64, 64], [40, 0, 64, 0]]
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["3 / 4", "layer removed", "attention removed", "layer removed"]


def test_a_budget_that_was_missed_is_said_under_the_rounds(tmp_path: Path) -> None:
    student_folder(tmp_path / "student")
    given = metrics()
    given["rounds"][-1]["note"] = "round 2 kept 47.50% instead of 50.00%"
    assert "Round 2 kept 47.50% instead of 50.00%." in write_report(tmp_path, given).read_text()


def test_a_perplexity_is_told_as_one_and_the_title_says_what_was_done(tmp_path: Path) -> None:
    student_folder(tmp_path / "student")
    lower = metrics(metric="perplexity", higher_is_better=False, retention=0.42, learned_from=None)
    lower["student"]["score"], lower["teacher"]["score"] = 183.02, 77.001
    text = write_report(tmp_path, lower).read_text()
    assert text.startswith("# teacher-model, pruned on sst2\n") and "keeps" not in text
    assert "has a perplexity of 183 (teacher: 77)" in text
    assert "pruned and fine-tuned on" in write_report(tmp_path, metrics(learned_from="labels")).read_text()
    assert "# teacher-model, distilled on" in write_report(tmp_path, metrics(rounds=[])).read_text()
