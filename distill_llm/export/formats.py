"""The formats that a student can be written in, by name, and the function that writes one."""

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill_llm.common.errors import InputError, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the file or folder.
        summary: one line: how the other program sees the model, and its size.
        notes: further lines that a user should read.
    """

    path: Path
    summary: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        module: the file of this room that writes it; it defines `write(model_dir, output, quantize) -> Exported`, and
            `check(config, tokenizer)`, which raises an InputError for a family or a tokenizer that the format cannot say.
        types: what `quantize` may be; the first is the default.
        packages: imported names of the packages that it needs.
        install: the extra that installs them.
        default_name: of the file or folder, where no output is named.
    """

    module: str
    types: tuple[str, ...]
    packages: tuple[str, ...]
    install: str
    default_name: str

    @property
    def write(self) -> Callable[[Path, Path, str], Exported]:
        """The function that writes this format."""
        return importlib.import_module(self.module).write

    @property
    def check(self) -> Callable[["PreTrainedConfig", "PreTrainedTokenizerBase"], None]:
        """The function that checks a model before it is pruned."""
        return importlib.import_module(self.module).check


FORMATS: dict[str, Format] = {
    "gguf": Format("distill_llm.export.gguf", ("f16", "bf16", "f32", "q8_0"), ("gguf",), "gguf", "model-{type}.gguf"),
    "onnx": Format("distill_llm.export.onnx", ("f32", "int8"), ("onnxscript", "onnxruntime"), "onnx", "onnx-{type}"),
}


def export(
    model_dir: str | Path, format: str, output: str | Path | None = None, quantize: str | None = None
) -> Exported:
    """Write a model, pruned or not, for another program.

    Args:
        model_dir: a folder with the model and its tokenizer, as a run leaves it in `student/`.
        format: a name in `FORMATS`.
        output: the file or folder to write, whole or not at all; None: beside `model_dir`, and named after it: a run writes
            its `student/` anew, and `push` uploads all that is in it.
        quantize: a type of number that the format has; None: its first.

    Raises:
        InputError: the folder holds no model, the format or type does not exist, its packages are not installed, the output
            exists, or the format cannot say this model.
    """
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise InputError("model_dir", str(model_dir), "a folder with a config.json, as save_pretrained writes it")
    _check_precision(folder)
    kind, chosen = find_format(format, quantize)
    name = kind.default_name.format(type=chosen)
    target = folder.parent / f"{folder.resolve().name}-{name}" if output is None else Path(output)
    if target.exists():
        raise InputError("output", str(target), fix="name another file, or remove this one: it exists")
    return kind.write(folder, target, chosen)


def _check_precision(folder: Path) -> None:
    """Refuse a model in fewer bits: a format rounds by itself, from the full precision."""
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        fix = "name the folder that it was quantized from, and say here how the format is to round (quantize)"
        raise InputError("model_dir", str(folder), fix=fix)


def find_format(format: str, quantize: str | None = None) -> tuple[Format, str]:
    """A format by its name, and the type of number to write.

    Raises:
        InputError: the format or the type does not exist, or its packages are not installed.
    """
    kind = FORMATS.get(format)
    if kind is None:
        raise InputError("format", format, one_of(FORMATS, format))
    chosen = kind.types[0] if quantize is None else quantize
    if chosen not in kind.types:
        raise InputError("quantize", quantize, one_of(kind.types, chosen))
    if missing := [name for name in kind.packages if importlib.util.find_spec(name) is None]:
        fix = f"install what it needs ({', '.join(missing)}): pip install 'distill_llm[{kind.install}]'"
        raise InputError("format", format, fix=fix)
    return kind, chosen
