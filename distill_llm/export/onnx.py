"""ONNX graphs, for onnxruntime, through transformers' own exporters.

An encoder is one graph, `model.onnx`. A decoder is two: `prefill.onnx` reads a prompt and returns its logits and the cache,
`decode.onnx` reads one further token. Batch and length are free in all of them. `ExportedModel.from_pretrained(folder)` of
transformers runs them.
"""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.exporters import (
    ExportedModel,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)

from distill_llm.architectures.configuration_pruned import stock_config_of
from distill_llm.architectures.modeling_pruned import EmptyLinear
from distill_llm.architectures.modes import forward_as
from distill_llm.common.errors import InputError, first_line
from distill_llm.common.files import written_whole
from distill_llm.export.formats import Exported
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.configs import open_tokenizer
from distill_llm.models.exits import without_exits

ROWS, TOKENS = 2, 16
"""Size of the batch that a graph is traced with."""


def check(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Nothing is known of a family before its model is traced."""


def write(model_dir: Path, output: Path, quantize: str) -> Exported:
    """Write a model as ONNX graphs in float32 or, with int8, with quantized weights; its tokenizer beside it.

    Raises:
        InputError: transformers cannot export this model.
    """
    model = load_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = open_tokenizer(model_dir, model.config)
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if quantize == "int8" else None
    config = OnnxConfig(dynamic=True, quantizer=quantizer)
    exporter, inputs = OnnxExporter(), _sample(model, tokenizer)
    export: Any = exporter.export_for_generation if model.can_generate() else exporter.export
    without_exits(model.config)  # the graph is of all layers
    vars(model.config).pop("auto_map", None)  # the code that it names stays where the weights are
    with _silent(), _no_empty_products(model):
        try:
            exported: ExportedModel = export(model, inputs, config)
        except (RuntimeError, ValueError, NotImplementedError, torch.onnx.OnnxExporterError) as error:
            accepted = f"a model that transformers can export to ONNX ({first_line(error.__cause__ or error)})"
            raise InputError("model_dir", type(model).__name__, accepted) from error
        with written_whole(output) as folder, stock_config_of(model.config):  # the graphs need no code beside them
            exported.generation_config = model.generation_config if model.can_generate() else None
            exported.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    names = sorted(path.name for path in output.glob("*.onnx"))
    megabytes = sum(path.stat().st_size for path in output.glob("*.onnx*")) / 2**20
    return Exported(output, f"{output}: {', '.join(names)}, {quantize}, {megabytes:.1f} MB")


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Two rows of tokens, one of them padded, on the side that the model generates from."""
    draw = torch.Generator().manual_seed(0)
    embedding: Any = model.get_input_embeddings()
    ids = torch.randint(len(embedding.weight), (ROWS, TOKENS), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, : TOKENS // 4] = int(not model.can_generate())
    mask[1, -TOKENS // 4 :] *= int(model.can_generate())
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in tokenizer.model_input_names and not model.can_generate():
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


@contextlib.contextmanager
def _no_empty_products(model: PreTrainedModel) -> Iterator[None]:
    """Linears without inputs or outputs give their bias alone: onnxruntime cannot quantize a matrix without entries."""

    def bias_alone(linear: EmptyLinear, inputs: torch.Tensor) -> torch.Tensor:
        nothing = inputs.new_zeros(*inputs.shape[:-1], linear.out_features)
        return nothing if linear.bias is None else nothing + linear.bias

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, EmptyLinear):
                stack.enter_context(forward_as(module, functools.partial(bias_alone, module)))
        yield


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the reports of torch.onnx's steps."""
    levels = {
        name: logging.getLogger(name).level
        for name in ("torch.onnx", "torch._export", "transformers", "onnxscript", "onnx_ir", "root")
    }
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
