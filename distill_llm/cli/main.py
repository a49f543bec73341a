"""The command line. Bad input: exit code 2 and a line per fault on stderr; heavy imports wait until needed."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from distill_llm.cli import cache as cache_command
from distill_llm.cli import respond as responses
from distill_llm.cli.group import CommandGroup, is_main_process
from distill_llm.cli.options import as_options, read_columns
from distill_llm.common.errors import InputError, faults_in, raise_all
from distill_llm.common.outputs import usable_file
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import Recipe, load_recipe, parse_recipe, recipe_descriptions, recipe_folder
from distill_llm.recipe.yaml_input import override, read_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill_llm.models.finding import OpenModel

_PRUNING = PruningSection.model_fields

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
OutputDir = Annotated[Path | None, typer.Option(help="The run folder, in place of the recipe's output_dir.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field; may be repeated.")
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, folder, GGUF file, or package://PACKAGE/PATH.")
]
TaskName = Annotated[str, typer.Option(help="A GLUE task, embedded, text, prompts, classification or regression.")]
Columns = Annotated[
    str | None,
    typer.Option(metavar="NAME=COLUMN,...", help="Columns of your own data, such as text=review,label=mood."),
]
DataPath = Annotated[str | None, typer.Option(help="Folder, file or Hub id of the data; GLUE: the Hub's by default.")]


def _option(name: str, metavar: str | None = None) -> Any:
    """The option of a field of the recipe's pruning section. Numbers stay text: the section checks them."""
    words = get_args(_PRUNING[name].annotation)
    metavar = metavar or ("|".join(words) if words else None)
    return typer.Option(metavar=metavar, help=_PRUNING[name].description)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"distill_llm {version('distill_llm')}")
        raise typer.Exit


@app.callback()
def _settings(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bars, no warnings of the libraries.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prune and distill Hugging Face models."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which tells of kernels that nobody asked for
    if quiet:
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ[name] = "error"
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ[name] = "1"
        warnings.simplefilter("ignore")


@app.command(epilog="Example: distill-llm run quickstart --set pruning.keep=0.4")
def run(recipe: RecipeName, output_dir: OutputDir = None, settings: Settings = None) -> None:
    """Prune and distill as a recipe says; the same command again goes on where it stopped."""
    _run(_load(recipe, output_dir, settings or []))


@app.command(epilog="Example: distill-llm distill my_recipe.yaml --student pruned/")
def distill(
    recipe: RecipeName,
    student: Annotated[str | None, typer.Option(help="The student, in place of the recipe's student.model.")] = None,
    output_dir: OutputDir = None,
    settings: Settings = None,
) -> None:
    """Distill into a student that exists: the recipe without its pruning, in a run folder of its own (NAME-distilled)."""
    chosen = [f"student.model={json.dumps(student)}"] if student else []
    try:
        loaded = _load(recipe, output_dir, [*(settings or []), "pruning=null", *chosen])
    except InputError as error:
        if any(fault.field == "pruning" for fault in faults_in(error)):  # the one fault of a recipe without a student
            raise InputError("--student", None, "a model's folder or Hub id, or student.model in the recipe") from None
        raise
    if output_dir is None and not any(text.startswith("output_dir=") for text in settings or []):
        loaded.output_dir = loaded.output_dir.with_name(f"{loaded.output_dir.name}-distilled")
    _run(loaded)


@app.command(
    epilog="Example: distill-llm prune textattack/bert-base-uncased-SST-2 --task sst2 --keep 0.5 --output-dir pruned"
)
def prune(
    model: ModelName,
    task: TaskName,
    keep: Annotated[str, _option("keep", "NUMBER")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the pruned model.")],
    data: DataPath = None,
    columns: Columns = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens an example is cut to.")] = 128,
    units: Annotated[str, _option("units", "A,B")] = ",".join(_PRUNING["units"].default),
    criterion: Annotated[str, _option("criterion")] = _PRUNING["criterion"].default,
    cost: Annotated[str, _option("cost")] = _PRUNING["cost"].default,
    scope: Annotated[str, _option("scope")] = _PRUNING["scope"].default,
    round_to: Annotated[str, _option("round_to", "NUMBER")] = str(_PRUNING["round_to"].default),
    uniform: Annotated[bool, _option("uniform")] = _PRUNING["uniform"].default,
    compensate: Annotated[bool, _option("compensate")] = _PRUNING["compensate"].default,
    calibration_examples: Annotated[str | None, _option("calibration_examples", "NUMBER")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Any other field of a recipe, such as pruning.cuts=5, seed=1."),
    ] = None,
) -> None:
    """Measure importance, prune, compensate and save; no training."""
    pruning = {
        "keep": keep,
        "units": [unit.strip() for unit in units.split(",")],
        "criterion": criterion,
        "cost": cost,
        "scope": scope,
        "round_to": round_to,
        "uniform": uniform,
        "compensate": compensate,
    }
    if calibration_examples is not None:
        pruning["calibration_examples"] = calibration_examples
    given = {
        "teacher": {"model": model},
        "data": {"task": task, "path": data, "columns": read_columns(columns), "max_length": max_length},
        "pruning": pruning,
        "output_dir": str(output_dir),
    }
    for text in settings or []:
        override(given, text)
    with as_options():
        recipe = parse_recipe(given)
        _quiet_weights()
        from distill_llm.pipeline.run import prune_recipe

        folder = prune_recipe(recipe)
    _say(f"pruned model: {folder}")
    _say_loading(folder)


@app.command(epilog="Example: distill-llm evaluate runs/quickstart/student --task embedded --max-length 64")
def evaluate(
    model: ModelName,
    task: TaskName,
    data: DataPath = None,
    columns: Columns = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at once.")] = 64,
    max_length: Annotated[
        int, typer.Option(min=8, help="Tokens an example is cut to: the recipe's data.max_length, or scores differ.")
    ] = 128,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="perplexity|exact_match|final_answer|f1|...|NAME[:VALUE]",
            help="The main metric, by default the task's own; for prompts also NAME of a metric of evaluate (rouge:rougeL).",
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask prompts in the words of the chat template.")] = False,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="YAML", help="What the template is given beside the chats: '{enable_thinking: false}'."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a generated response.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the masks of masked language modelling.")] = 0,
    output: Annotated[Path, typer.Option(help="File for the metrics.")] = Path("evaluation.json"),
) -> None:
    """Score a model on a task's test rows (GLUE: the development set); prints and saves the metrics."""
    usable_file(output, "--output")
    from distill_llm.data.encoding import collator, encode
    from distill_llm.data.loading import load_task
    from distill_llm.data.sources import resolve_path
    from distill_llm.data.spec import DataSpec
    from distill_llm.evaluation.evaluate import evaluate_model
    from distill_llm.models.finding import check_head, check_tokens, open_model
    from distill_llm.models.limits import length_faults, limits_of

    names = read_columns(columns)
    with as_options():
        opened = open_model("MODEL", model)
        spec = DataSpec(
            task,
            data,
            names,
            max_length,
            seed=seed,
            metric=metric,
            max_new_tokens=max_new_tokens,
            chat=chat,
            chat_template_kwargs=read_mapping(chat_template_kwargs, "--chat-template-kwargs"),
        )
        rows = load_task(spec, opened.config, training=False)
        check_head(opened, rows.task)
        limits = limits_of(opened.config, opened.name)
        raise_all(length_faults(limits, max_length, "--max-length"))
        rows.task.kind.check_rows(rows, opened.tokenizer)
        encoded = check_tokens(encode(rows, opened.tokenizer, max_length), opened)
        metrics = evaluate_model(
            _load_model(opened),
            encoded.test,
            rows.task,
            collator(rows.task, opened.tokenizer, seed=seed),
            batch_size=batch_size,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"model": model, "task": task, **metrics}, indent=2) + "\n", encoding="utf-8")
    table = Table("metric", "value", title=f"{model} on {rows.task.name}, {len(encoded.test)} examples")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    _say(table)
    if data is not None and Path(resolve_path(data)).is_file():
        _say(
            f"{data} has no test split: scored are {len(rows.test)} of its rows, the tenth that a run on it is scored on"
        )
    _say(f"metrics: {output}")


@app.command(epilog="Example: distill-llm profile runs/quickstart/student --against runs/quickstart/teacher")
def profile(
    model: ModelName,
    against: Annotated[str | None, typer.Option(help="A second model, measured in turn with the first.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in the batch.")] = 32,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of each example.")] = 64,
) -> None:
    """Parameters, FLOPs, memory and latency of a model on this device, as a table; two models side by side."""
    from distill_llm.measuring import profiling
    from distill_llm.models.finding import open_model
    from distill_llm.models.limits import length_faults, limits_of

    names = {"MODEL": model} | ({"--against": against} if against is not None else {})
    opened = [open_model(field, name, tokenizer=False) for field, name in names.items()]
    for each in opened:
        raise_all(length_faults(limits_of(each.config, each.name), sequence_length, "--sequence-length"))
    models = [_load_model(each) for each in opened]
    measure: Any = profiling.profile if against is None else profiling.compare
    result = measure(*models, batch_size, sequence_length)
    _say(profiling.profile_table(result, (model, against or "")))


@app.command(epilog="Example: distill-llm push runs/quickstart/student me/my-student --private")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A student's folder: model, tokenizer, card.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="USER_OR_ORGANISATION/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a student with its tokenizer, card and evaluation results to the Hub."""
    if not (folder / "config.json").is_file():
        raise InputError("DIR", str(folder), "a student's folder, with config.json")
    from distill_llm.report.hub import push as upload

    with as_options():
        url = upload(folder, repo_id, private=private)
    _say(f"pushed: {url}")


app.command("respond", epilog=responses.EXAMPLE)(responses.respond)
app.command("cache", epilog=cache_command.EXAMPLE)(cache_command.cache)


@app.command(epilog="Example: distill-llm recipes")
def recipes() -> None:
    """List the shipped recipes: name and description."""
    table = Table("recipe", "description", title=f"recipes in {recipe_folder()}")
    for name, description in recipe_descriptions().items():
        table.add_row(name, description)
    _say(table)


@app.command(epilog="Example: distill-llm families")
def families() -> None:
    """List the model families that can be pruned, and what of each."""
    from distill_llm.pruning.supported import families_table

    _say(families_table())


def _load(name: str, output_dir: Path | None, settings: list[str]) -> Recipe:
    given = [f"output_dir={json.dumps(str(output_dir))}"] if output_dir else []
    return load_recipe(name, [*settings, *given])


def _run(recipe: Recipe) -> None:
    _quiet_weights()
    from distill_llm.pipeline import run as pipeline

    result = pipeline.run(recipe, recipe.output_dir)
    _say(f"student: {result.student_dir}")
    _say(f"report:  {result.report}")
    _say_loading(result.student_dir)


def _say_loading(student: Path) -> None:
    from distill_llm.report.usage import loading

    if is_main_process():
        _say(f"loads as {loading(student)}")


def _quiet_weights() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving weights; training keeps its own


def _load_model(opened: "OpenModel") -> "PreTrainedModel":
    from distill_llm.models.checkpoint import load_pretrained

    with as_options(model=opened.field):
        return load_pretrained(opened.path).to(_device())  # type: ignore[arg-type]


def _device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def _say(what: Any) -> None:
    if is_main_process():
        Console(soft_wrap=isinstance(what, str)).print(what, markup=False)


if __name__ == "__main__":
    app(prog_name="distill-llm")
