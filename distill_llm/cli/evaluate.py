"""`distill-llm evaluate`: the metrics of a model on a task."""

import json
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from distill_llm.cli.options import (
    ChatTemplateKwargs,
    Columns,
    DataPath,
    DropIncomplete,
    Encoding,
    ModelName,
    Separator,
    TaskName,
    TrustCode,
    as_options,
    read_columns,
)
from distill_llm.cli.output import load_model, say
from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.outputs import usable_file
from distill_llm.recipe.yaml_input import read_mapping

if TYPE_CHECKING:
    from distill_llm.data.spec import DataSpec

EXAMPLE = "Example: distill-llm evaluate runs/quickstart/student --task embedded --max-length 64"

HarnessTasks = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="In place of --task: benchmarks of lm-evaluation-harness, for decoders."),
]
NumFewshot = Annotated[
    int | None, typer.Option(min=0, help="Examples before each question of a benchmark; by default the task's.")
]
IncludePath = Annotated[
    Path | None, typer.Option(help="Folder with benchmarks of your own, as YAML files of the harness.")
]
MainMetric = Annotated[
    str | None,
    typer.Option(
        metavar="perplexity|exact_match|final_answer|f1|...|NAME[:VALUE]",
        help="The main metric, by default the task's own. For prompts also a metric of the library evaluate (rouge:rougeL).",
    ),
]
MaxLength = Annotated[
    int,
    typer.Option(min=8, help="Tokens that an example is cut to. Use the recipe's data.max_length, or scores differ."),
]


def evaluate(
    model: ModelName,
    task: TaskName | None = None,
    harness: HarnessTasks = None,
    num_fewshot: NumFewshot = None,
    include_path: IncludePath = None,
    data: DataPath = None,
    columns: Columns = None,
    separator: Separator = None,
    encoding: Encoding = None,
    drop_incomplete: DropIncomplete = False,
    test_examples: Annotated[
        int | None, typer.Option(min=1, help="Number of test rows to score on; by default all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of examples at once.")] = 64,
    max_length: MaxLength = 128,
    metric: MainMetric = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")] = False,
    chat_template_kwargs: ChatTemplateKwargs = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens in a response.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the masks of masked language modelling.")
    ] = 0,
    trust_remote_code: TrustCode = False,
    output: Annotated[Path, typer.Option(help="File for the metrics.")] = Path("evaluation.json"),
) -> None:
    """Score a model on a task's test rows. Of a GLUE task they are the development set. The metrics are printed and saved."""
    usable_file(output, "--output")
    if (task is None) == (harness is None):
        raise InputError("--task", task, fix="give either a task, or --harness with the names of benchmarks")
    if harness is not None:
        names = tuple(dict.fromkeys(name.strip() for name in harness.split(",")))
        wanted = {"limit": test_examples, "num_fewshot": num_fewshot, "include_path": include_path, "chat": chat}
        _run_harness(model, names, wanted, batch_size, output, trust_remote_code)
        return
    assert task is not None
    from distill_llm.data.spec import DataSpec

    with as_options(signature(evaluate).parameters, {"model": "MODEL"}):
        spec = DataSpec(
            task,
            data,
            read_columns(columns),
            max_length,
            seed=seed,
            metric=metric,
            max_new_tokens=max_new_tokens,
            chat=chat,
            chat_template_kwargs=read_mapping(chat_template_kwargs, "chat_template_kwargs"),
            test_examples=test_examples,
            separator=separator,
            encoding=encoding,
            drop_incomplete=drop_incomplete,
        )
        _score(model, spec, batch_size, output, trust_remote_code)


def _run_harness(
    model: str, names: tuple[str, ...], wanted: dict[str, Any], batch_size: int, output: Path, trust_remote_code: bool
) -> None:
    """Score by lm-evaluation-harness, print and save."""
    from distill_llm.checks.evaluate import open_benchmarks
    from distill_llm.evaluation.harness import Benchmarks, run_benchmarks
    from distill_llm.metrics.errors import shown_score

    benchmarks = Benchmarks(names, **wanted)
    with as_options(signature(evaluate).parameters, {"model": "MODEL"}):
        opened = open_benchmarks(model, benchmarks, trust_remote_code)
        scores = [asdict(each) for each in run_benchmarks(load_model(opened), opened.tokenizer, benchmarks, batch_size)]
    with written_whole(output) as file:
        file.write_text(json.dumps({"model": model, "harness": scores}, indent=2) + "\n", encoding="utf-8")
    table = Table("benchmark", "metric", "score", "rows", "shots", title=model)
    for each in scores:
        table.add_row(each["task"], each["metric"], shown_score(each), str(each["rows"]), str(each["shots"]))
    say(table)
    say(f"metrics: {output}")


def _score(model: str, spec: "DataSpec", batch_size: int, output: Path, trust_remote_code: bool) -> None:
    """Score, print and save."""
    from distill_llm.checks.evaluate import open_scoring
    from distill_llm.data.encoding import collator
    from distill_llm.evaluation.baselines import baselines, no_better
    from distill_llm.evaluation.evaluate import evaluate_model
    from distill_llm.evaluation.rules import RECIPE_FIELDS
    from distill_llm.metrics.errors import shown_score
    from distill_llm.models.masks import SHOWN, sparsity_of

    opened = open_scoring(model, spec, trust_remote_code)
    task, rows = opened.data.task, opened.data.test
    pad = collator(task, opened.model.tokenizer, seed=spec.seed)
    loaded = load_model(opened.model)
    metrics = evaluate_model(loaded, rows, task, pad, batch_size=batch_size, fields=RECIPE_FIELDS)
    naive = baselines(task, None, rows)
    if not opened.model.exported and (zeros := sparsity_of(loaded)) >= SHOWN:
        metrics["zero_weights"] = zeros  # of the layers' linears
    with written_whole(output) as file:
        file.write_text(
            json.dumps({"model": model, "task": spec.task, **metrics, "baselines": naive}, indent=2) + "\n",
            encoding="utf-8",
        )
    table = Table("metric", "value", title=f"{model} on {task.name}, {len(rows)} examples")
    for name, value in metrics.items():
        table.add_row(name, shown_score(metrics) if name == "score" else f"{value:.4f}")
    if (warning := no_better(task, metrics, naive, model)) is not None:
        say(f"WARNING: {warning}")
    say(table)
    say(f"metrics: {output}")
