"""`distill-llm respond`: the command line of generated responses."""

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_llm.cli.group import is_main_process
from distill_llm.cli.options import ChatTemplateKwargs, Encoding, Separator, TeacherDtype, TrustCode, as_options
from distill_llm.cli.output import quiet_weights
from distill_llm.cli.served import SERVER_OPTIONS, KeyVariable, ServedModel, Server, read_endpoint
from distill_llm.recipe.yaml_input import read_mapping

if TYPE_CHECKING:
    from distill_llm.responses.folder import Counts

EXAMPLE = (
    "Example: distill-llm respond HuggingFaceTB/SmolLM2-1.7B-Instruct --data prompts.jsonl --chat --output-dir answers"
)


PromptColumn = Annotated[
    str | None, typer.Option(help="Column with texts or chats; by default prompt, or else messages.")
]


def respond(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="Hub id, folder, GGUF file, or package://PACKAGE/PATH.")
    ],
    data: Annotated[str, typer.Option(help="File, folder or Hub id with prompts or chats (its train split).")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the responses; a recipe then names it as data.path.")],
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens in a response.")] = 256,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability; 1: from all.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    samples: Annotated[int, typer.Option(help="Number of responses to each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Number of responses at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    separator: Separator = None,
    encoding: Encoding = None,
    prompt_column: PromptColumn = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts that are texts into the chat template.")] = False,
    chat_template_kwargs: ChatTemplateKwargs = None,
    max_prompts: Annotated[int | None, typer.Option(help="Use only this many rows, the first ones.")] = None,
    server: Server = None,
    served_model: ServedModel = None,
    key_variable: KeyVariable = None,
    dtype: TeacherDtype = None,
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Keep responses that were cut at --max-new-tokens.")
    ] = False,
    trust_remote_code: TrustCode = False,
) -> None:
    """Let a teacher answer prompts, to train on its answers. Run the same command again to continue after a stop."""
    quiet_weights()
    from distill_llm.responses.respond import respond as generate
    from distill_llm.responses.settings import ResponseSettings

    with as_options(signature(respond).parameters, {"teacher": "TEACHER", "model": "TEACHER", **SERVER_OPTIONS}):
        settings = ResponseSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            prompt_column=prompt_column,
            chat=chat,
            chat_template_kwargs=read_mapping(chat_template_kwargs, "chat_template_kwargs"),
            max_prompts=max_prompts,
            dtype=dtype,
            keep_truncated=keep_truncated,
            separator=separator,
            encoding=encoding,
            trust_remote_code=trust_remote_code,
        )
        endpoint = read_endpoint(server, served_model or teacher, key_variable)
        counts = generate(teacher, data, output_dir, settings, server=endpoint)
    if is_main_process():
        for line in _summary(counts, output_dir, keep_truncated):
            print(line)


def _summary(counts: "Counts", folder: Path, keep_truncated: bool) -> list[str]:
    mean = counts.token_logprob
    likelihood = "" if mean is None else f", on average {mean:.3f} nats each under the teacher"
    truncated = "kept" if keep_truncated else "left out"
    return [
        f"prompts:   {counts.prompts:,} ({counts.prompts_read - counts.prompts:,} repeated prompts left out)",
        f"responses: {counts.responses:,} with {counts.tokens:,} tokens{likelihood}",
        f"truncated: {counts.truncated:,} ({counts.truncated_share:.1%}), {truncated}",
        f"repeated:  {counts.repeated:,} ({counts.repeated_share:.1%}), left out",
        f"kept:      {counts.kept:,} ({counts.kept_share:.1%}) in {folder}",
    ]
