"""The model card is valid for the Hub, and its code runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from builders.causal import causal_model
from builders.disks import fill_disk
from builders.hub import Blob, Repo, connect, serving
from builders.models import tiny_model
from builders.reports import metrics, student_folder
from huggingface_hub import ModelCard, parse_eval_result_entries
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.report import write_card
from distill_llm.report.usage import loading

RECIPE = "teacher:\n  model: owner/teacher-model\n"
WITH_PATHS = """description: for the desk of a/b, and more
output_dir: /home/someone/secret/runs/quickstart
teacher:
  model: /home/someone/secret/bert-x/
  train:
    deepspeed: ../secret/zero2.json
  cache: ~/secret/cache
student:
  model: null
  peft:
    target_modules:
    - query
data:
  task: sst2
  path: Salesforce/wikitext:wikitext-2-raw-v1
pruning:
  keep: 0.5
  statistics: secret/all/statistics.safetensors
distillation:
  report_to: []
  logging_dir: /home/someone/secret/logs
hub:
  repo_id: me/student
"""
SHOWN = """description: for the desk of a/b, and more
output_dir: quickstart
teacher:
  model: bert-x
  train:
    deepspeed: zero2.json
  cache: cache
student:
  model: null
  peft:
    target_modules:
    - query
data:
  task: sst2
  path: Salesforce/wikitext:wikitext-2-raw-v1
pruning:
  keep: 0.5
  statistics: statistics.safetensors
distillation:
  report_to: []
  logging_dir: logs
hub:
  repo_id: me/student
"""


def test_metadata_reads_back_with_score_base_model_and_pipeline(tmp_path: Path) -> None:
    card = ModelCard.load(write_card(student_folder(tmp_path), metrics(), RECIPE))
    assert card.data.library_name == "transformers"
    assert card.data.base_model == "owner/teacher-model"
    assert card.data.pipeline_tag == "text-classification"
    assert {"distill_llm", "pruning", "knowledge-distillation"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.796)
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("nyu-mll/glue", "sst2", "validation")


def test_front_matter_has_the_model_index_of_the_hub(tmp_path: Path) -> None:
    text = write_card(student_folder(tmp_path), metrics(), RECIPE).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    (entry,) = front["model-index"]
    assert entry["name"] == "teacher-model-sst2-student"
    assert entry["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.796}]
    assert front["datasets"] == ["nyu-mll/glue"] and front["metrics"] == ["accuracy"]


def test_mnli_reports_its_matched_split_and_other_data_their_own_name(tmp_path: Path) -> None:
    mnli = ModelCard.load(write_card(student_folder(tmp_path), metrics(task="mnli"), RECIPE))
    assert mnli.data.eval_results[0].dataset_split == "validation_matched"
    other = ModelCard.load(write_card(student_folder(tmp_path), metrics(task="embedded"), RECIPE))
    result = other.data.eval_results[0]
    assert (result.dataset_type, result.dataset_split, other.data.datasets) == ("embedded", None, None)


@pytest.mark.parametrize("teacher", ["/home/someone/secret/bert-x", "./runs/bert-x", "package://some_package/bert-x"])
def test_a_teacher_that_is_no_hub_model_is_no_base_model_and_is_shown_by_its_name(tmp_path: Path, teacher: str) -> None:
    path = write_card(student_folder(tmp_path), metrics(teacher_model=teacher), RECIPE)
    assert ModelCard.load(path).data.base_model is None
    text = path.read_text()
    assert "bert-x" in text and "secret" not in text and "./runs" not in text


def test_card_holds_table_recipe_and_results_file(tmp_path: Path) -> None:
    text = write_card(student_folder(tmp_path), metrics(), RECIPE).read_text()
    assert "| recovered" in text and f"```yaml\n{RECIPE}```" in text
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics()


def test_local_paths_do_not_leave_the_machine_with_the_recipe_or_the_metrics(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = metrics(teacher_model="/home/someone/secret/bert-x/")
    text = write_card(student_folder(tmp_path), given, WITH_PATHS).read_text()
    assert f"```yaml\n{SHOWN}```" in text
    assert json.loads((tmp_path / "metrics.json").read_text()) == {**given, "teacher_model": "bert-x"}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and "secret" in file.read_text()]
    assert given["teacher_model"] == "/home/someone/secret/bert-x/", "the run's own metrics"
    (tmp_path / "models" / "bert-y").mkdir(parents=True)
    text = write_card(student_folder(tmp_path), given, "teacher:\n  model: models/bert-y\n").read_text()
    assert "model: bert-y\n" in text, "a folder, though it could be the name of a repository"


@pytest.mark.parametrize(
    ("architecture", "loader", "tag"),
    [
        ("PrunedBertForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        ("DistilBertForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
        ("PrunedGPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
    ],
)
def test_loading_code_fits_the_head(tmp_path: Path, architecture: str, loader: str, tag: str) -> None:
    path = write_card(student_folder(tmp_path, architecture), metrics(), RECIPE)
    assert f"{loader}.from_pretrained(model_id).eval()" in path.read_text()
    assert ModelCard.load(path).data.pipeline_tag == tag


def test_tags_say_what_was_done(tmp_path: Path) -> None:
    folder = student_folder(tmp_path)
    for changes, tags in (
        ({}, ["distill_llm", "knowledge-distillation", "pruning"]),
        ({"learned_from": None}, ["distill_llm", "pruning"]),
        ({"rounds": []}, ["distill_llm", "knowledge-distillation"]),
    ):
        assert ModelCard.load(write_card(folder, metrics(**changes), RECIPE)).data.tags == tags


def test_trust_remote_code_only_where_the_checkpoint_has_code(tmp_path: Path) -> None:
    assert "trust_remote_code" not in write_card(student_folder(tmp_path), metrics(), RECIPE).read_text()
    pruned = student_folder(tmp_path, auto_map={"AutoModel": "modeling_pruned.PrunedBertModel"})
    assert "from_pretrained(model_id, trust_remote_code=True)" in write_card(pruned, metrics(), RECIPE).read_text()


def test_one_line_says_how_a_student_loads(tmp_path: Path) -> None:
    stock = loading(student_folder(tmp_path / "a", "BertForMaskedLM"))
    assert stock == f'AutoModelForMaskedLM.from_pretrained("{tmp_path / "a"}"): a stock transformers model'
    model = tiny_model()
    whole = full_plan(model).layers
    cut = [replace(whole[0], neurons=whole[0].neurons[:7]), *whole[1:]]
    prune(model, PruningPlan("bert", tuple(cut))).save_pretrained(tmp_path / "b")
    own = f'AutoModelForSequenceClassification.from_pretrained("{tmp_path / "b"}", trust_remote_code=True): '
    assert loading(tmp_path / "b") == own + "its layers keep different numbers of heads or neurons"


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm", "gpt2"])
def test_the_code_of_the_card_runs(tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = causal_model("gpt2", eos_token_id=None) if head == "gpt2" else tiny_model(head=head)
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "good": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(tmp_path)
    text = write_card(tmp_path, metrics(), RECIPE).read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    exec(code.replace("path/to/student", str(tmp_path)), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "metrics.json"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = student_folder(tmp_path)
    write_card(folder, metrics(), RECIPE)
    before = (folder / name).read_text()
    fill_disk(monkeypatch)
    with pytest.raises(InputError, match="^disk: got .*: No space"):
        write_card(folder, metrics(task="mrpc"), RECIPE)
    assert (folder / name).read_text() == before and not list(folder.glob("*.partial"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="student_dir: got .*config.json"):
        write_card(tmp_path, metrics(), RECIPE)


def test_a_head_of_no_known_kind_is_one_line_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"student_dir: got 'BertForQuestionAnswering'; .*ForMaskedLM") as caught:
        loading(student_folder(tmp_path, "BertForQuestionAnswering"))
    assert "\n" not in str(caught.value)


TEACHERS_CARD = """---
license: other
license_name: a-licence
license_link: LICENSE
language: en
base_model: owner/base-model
datasets: [owner/data, /home/someone/secret/data]
---
"""


def test_licence_language_base_model_and_data_come_from_the_teachers_card(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text(TEACHERS_CARD)
    given = metrics(teacher_model=str(tmp_path / "teacher"))
    data = ModelCard.load(write_card(student_folder(tmp_path / "student"), given, RECIPE)).data
    assert (data.license, data.license_name, data.language) == ("other", "a-licence", "en")
    assert data.license_link is None, "no such file is in the repository"
    assert (data.base_model, data.datasets) == ("owner/base-model", ["nyu-mll/glue", "owner/data"])
    recipe = RECIPE + "student:\n  model: owner/small-model\n"
    distilled = ModelCard.load(write_card(tmp_path / "student", given | {"rounds": []}, recipe))
    assert (distilled.data.base_model, distilled.data.datasets) == ("owner/small-model", ["nyu-mll/glue"])
    assert distilled.data.license is None and "began as `owner/small-model`" in distilled.text
    (tmp_path / "teacher" / "README.md").write_text("---\n: {[\n---\n")
    assert ModelCard.load(write_card(tmp_path / "student", given, RECIPE)).data.base_model is None


def test_the_licence_of_a_teacher_on_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        connect(monkeypatch, hub, tmp_path / "cache", token=None)
        hub.repos["models/owner/teacher-model"] = Repo(commits=[{"README.md": Blob(TEACHERS_CARD.encode(), False)}])
        data = ModelCard.load(write_card(student_folder(tmp_path / "student"), metrics(), RECIPE)).data
        url = f"{hub.url}/owner/teacher-model/resolve/main/LICENSE"
    assert (data.license, data.license_link, data.base_model) == ("other", url, "owner/teacher-model")


@pytest.mark.parametrize(
    ("task", "recipe", "dataset"),
    [
        ("sst2", RECIPE, {"id": "nyu-mll/glue", "task_id": "sst2"}),
        ("text", "data: {path: owner/texts:part}", {"id": "owner/texts", "task_id": "part"}),
        ("text", "data: {path: owner/texts}", {"id": "owner/texts", "task_id": "default"}),
        ("text", "data: {path: /home/texts}", None),
    ],
)
def test_the_score_is_a_file_of_evaluation_results_where_the_data_are_on_the_hub(
    tmp_path: Path, task: str, recipe: str, dataset: dict | None
) -> None:
    given = metrics(task=task)
    given["student"]["rows"] = 1200
    write_card(student_folder(tmp_path), given, recipe)
    files = list((tmp_path / ".eval_results").glob("*")) if dataset else []
    assert (tmp_path / ".eval_results").exists() == bool(dataset)
    for file in files:
        (entry,) = yaml.safe_load(file.read_text())
        rows = "the validation split" if task == "sst2" else "1,200 rows"
        assert file.name == f"{task}.yaml" and entry["dataset"] == dataset and entry["value"] == 0.796
        assert parse_eval_result_entries([entry])[0].notes == f"accuracy on {rows}; the teacher's: 0.8"


def test_the_plan_beside_a_student_makes_its_architecture_of_the_original_teacher(tmp_path: Path) -> None:
    teacher = tiny_model()
    whole = full_plan(teacher).layers
    once = prune(teacher, PruningPlan("bert", (replace(whole[0], neurons=range(3, 40)), whole[2])))
    again = full_plan(once).layers
    student = prune(once, PruningPlan("bert", (replace(again[0], neurons=(0, 5)), again[1])))
    student.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_card(tmp_path, metrics(), RECIPE)
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert [(row.source, row.neurons) for row in plan.layers] == [(0, (3, 8)), (2, tuple(range(64)))]
    assert plan.kept == 0.5, "the share of the layers' parameters in the metrics"
    made = prune(teacher, plan).state_dict()
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in student.state_dict().items()}
