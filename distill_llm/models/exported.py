"""A model exported to ONNX, run by onnxruntime behind the interface of a transformers model: enough to score and to time it."""

import importlib.util
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from distill_llm.common.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel

MANIFEST = "export.json"
"""The file by which transformers knows a folder with an exported model."""


class ExportedNetwork(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Graphs in onnxruntime, called as the model that they were made from. It has no weights of its own to look at.

    Args:
        graphs: one graph, or, of a decoder, `prefill` and `decode`.
    """

    _supports_sdpa = True  # what a graph computes is fixed: transformers need not look for another attention

    def __init__(self, graphs: "ExportedModel"):
        assert graphs.config is not None  # export writes it
        super().__init__(graphs.config)
        self.graphs = graphs
        if graphs.generation_config is not None:
            self.generation_config = graphs.generation_config

    @property
    def device(self) -> torch.device:
        """Where onnxruntime computes."""
        return self.graphs.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model was traced in; weights may have fewer bits."""
        return self.graphs.dtype

    @property
    def weights(self) -> Counter[str]:
        """Bytes of the constants of the graph that reads a whole text, by their type (`float32`, `int8`)."""
        found: Counter[str] = Counter()
        for value in next(iter(self.graphs.components.values())).program.graph.initializers.values():
            found[str(value.const_value.dtype.numpy())] += value.const_value.nbytes
        return found

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        """The outputs of the model that was exported, for (B, T) tokens; with the cache of an earlier call for one token each.

        Raises:
            InputError: several sequences in a row, which graphs do not keep apart.
        """
        if attention_mask is None and position_ids is not None and (position_ids.diff() <= 0).any():
            raise InputError("position_ids", "packed rows", fix="give an exported model a row for each sequence")
        ids, before = input_ids, 0 if past_key_values is None else past_key_values.get_seq_length()
        runner = self.graphs.runners["decode"] if before else next(iter(self.graphs.runners.values()))
        mask = ids.new_ones(len(ids), before + ids.shape[1]) if attention_mask is None else attention_mask
        if position_ids is None:
            position_ids = (mask.cumsum(-1) - 1).clamp(0)[:, -ids.shape[1] :]
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "position_ids": position_ids}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if name in runner.metadata.kwargs}
        return runner(**chosen, **({"past_key_values": past_key_values} if before else {}))


def is_export(folder: Path) -> bool:
    """Whether a folder holds an exported model."""
    return os.path.isfile(folder / MANIFEST)  # false for a name that is too long as well


def check_export(field: str, name: str, folder: Path) -> None:
    """Check that the graphs are there, and onnxruntime to run them.

    Raises:
        InputError: naming `field`.
    """
    try:
        files = [folder / file for file in _graphs(folder).values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise InputError(field, name, f"a folder with an exported model ({MANIFEST} cannot be read)") from None
    for file in files:
        if file.suffix != ".onnx":
            raise InputError(field, name, f"a model exported to ONNX ({MANIFEST} names {file.name})")
        if not file.is_file():
            raise InputError(field, name, f"a folder with all graphs of the exported model ({file.name} is missing)")
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None:
        raise InputError(field, name, fix="install onnxruntime, which runs it: pip install 'distill_llm[onnx]'")


def load_export(folder: str | Path) -> ExportedNetwork:
    """Open the graphs in onnxruntime, on the device that it finds, with as many threads as PyTorch has.

    Raises:
        InputError: naming `model`: onnxruntime cannot read a graph.
    """
    import onnxruntime
    from transformers.exporters import ExportedModel

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        graphs = ExportedModel.from_pretrained(folder, session_options=options)
    except Exception as error:  # onnxruntime has a class for each kind of damage
        raise InputError("model", str(folder), f"graphs that onnxruntime can open ({first_line(error)})") from None
    return ExportedNetwork(graphs)


def _graphs(folder: Path) -> dict[str, str]:
    """The file of each graph, as the manifest says."""
    said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {name: str(entry["file"]) for name, entry in said["components"].items()}
