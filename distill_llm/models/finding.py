"""Models are opened before they are loaded: where one is, its config, its tokenizer, whether its head fits a task."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from distill_llm.common.errors import InputError, first_line, one_of, raise_all
from distill_llm.common.hub import check_hub_name
from distill_llm.common.notices import tell
from distill_llm.data.kinds import kind_of_head
from distill_llm.data.sources import resolve_path
from distill_llm.data.tasks import Task, TaskData, class_name_faults, label_names, same_names
from distill_llm.data.unsupported import unsupported_head
from distill_llm.models.adapters import adapter_folder_faults
from distill_llm.models.configs import TRUST, needs_trust, open_config, open_tokenizer
from distill_llm.models.exported import check_export, is_export
from distill_llm.models.gguf import SUFFIX, plain_checkpoint
from distill_llm.models.limits import RowFacts, beyond_vocabulary, limits_of, masking_faults, read_rows, row_faults

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


@dataclass(frozen=True)
class OpenModel:
    """A model that exists: the user's field and name for it, where it is, its config and tokenizer (None: not asked for).

    `trust_remote_code` says whether the user trusts the code that it brings along, `exported` that onnxruntime runs it.
    """

    field: str
    name: str
    path: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase = None  # type: ignore[assignment]
    trust_remote_code: bool = False
    exported: bool = False


def resolve_model(name: str, field: str = "model") -> str:
    """Where a model is: a folder, or a Hub id. A GGUF file is read once into a folder of the cache."""
    path = resolve_path(name, field)
    return str(plain_checkpoint(path, field)) if path.endswith(SUFFIX) and os.path.isfile(path) else path


def open_model(
    field: str, name: str, tokenizer: bool = True, trust_remote_code: bool = False, exported: bool = False
) -> OpenModel:
    """Find a model by folder, Hub id, package:// path or GGUF file and read its config and, but without `tokenizer`, that.

    Args:
        trust_remote_code: whether code that it brings along may run.
        exported: whether the folder of an ONNX export will do.

    Raises:
        InputError: naming `field`, where the model, its config or its tokenizer is missing; or, of a folder, weights.
    """
    path = resolve_model(name, field)
    local = Path(path)
    is_graph = is_export(local)
    if is_graph and not exported:
        raise InputError(field, name, fix="name the folder that it was exported from: an export is only run")
    if not os.path.exists(path):
        check_hub_name(path, field, name, "an existing folder or GGUF file, a Hub id, or package://PACKAGE/PATH")
    raise_all(adapter_folder_faults(field, name, path))
    if os.path.exists(path):
        if not (local / "config.json").is_file():
            raise InputError(field, name, "a folder with a config.json, as save_pretrained writes it")
        (check_export if is_graph else _check_weights)(field, name, local)
    try:
        config = open_config(path, trust_remote_code)
    except Exception as error:  # each family's config raises its own kinds
        raise _refused(field, name, "a model that transformers can open", path, error) from None
    classes = config.architectures
    if not (classes is None or (isinstance(classes, list) and all(isinstance(each, str) for each in classes))):
        raise InputError(field, name, f"a config.json with a list of names under `architectures` (it has {classes!r})")
    if not tokenizer:
        return OpenModel(field, name, path, config, trust_remote_code=trust_remote_code, exported=is_graph)
    if os.path.exists(path) and not any(any(local.glob(pattern)) for pattern in TOKENIZER_FILES):
        what = unsupported_head(classes or [])
        told = "" if what is None else f"; this model is for {what}, which is not supported"
        raise InputError(field, name, f"a folder with its tokenizer ({', '.join(TOKENIZER_FILES)}){told}")
    try:
        found = open_tokenizer(path, config, trust_remote_code)
    except Exception as error:
        raise _refused(field, name, "a model with its tokenizer", path, error) from None
    _check_vocabulary(field, name, config, found)
    return OpenModel(field, name, path, config, found, trust_remote_code, is_graph)


def _check_vocabulary(field: str, name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model has an embedding for all tokens but added ones that no row has to hold (Gemma 3's image token)."""
    limits = limits_of(config, name)
    beyond = beyond_vocabulary(limits, tokenizer)
    if not beyond:
        return
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
    needed = {getattr(tokenizer, f"{kind}_token_id") for kind in kinds} | set(tokenizer("a")["input_ids"])
    if needed & beyond.keys() or not beyond.keys() <= tokenizer.added_tokens_decoder.keys():
        accepted = f"a tokenizer of at most {limits.vocabulary} tokens, as the model has; it has {len(tokenizer)}"
        raise InputError(field, name, accepted)
    shown = ", ".join(list(beyond.values())[:3]) + (", ..." if len(beyond) > 3 else "")
    tell(f"{name} has no embedding for {len(beyond)} of its tokenizer's tokens ({shown}): texts must not contain them")


def check_tokens(data: TaskData, model: OpenModel, field: str) -> TaskData:
    """Encoded rows as they are, once it is known that a model has an embedding for all of their tokens.

    Args:
        field: what the rows are called.

    Raises:
        InputError: where a row holds a token beyond the model's vocabulary, or may come to hold one (masked words).
    """
    limits = limits_of(model.config, model.name)
    if not beyond_vocabulary(limits, model.tokenizer):
        return data
    if data.task.kind.changes_inputs:  # a masked word may become any token
        raise_all(masking_faults(limits, len(model.tokenizer), model.field, model.name))
    for split in (data.train, data.validation, data.test):
        beyond = read_rows(split, limits).beyond if split is not None else None
        raise_all(row_faults(limits, RowFacts(beyond=beyond), field, model.tokenizer))
    return data


def _check_weights(field: str, name: str, folder: Path) -> None:
    """The files that `from_pretrained` would read are there and, by their headers, whole."""
    file = next((folder / each for each in WEIGHTS if (folder / each).is_file()), None)
    if file is None:
        raise InputError(field, name, f"a folder with its weights ({', '.join(WEIGHTS)})")
    files = [file]
    if file.suffix == ".json":
        try:
            files = [folder / shard for shard in sorted(set(json.loads(file.read_text())["weight_map"].values()))]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise InputError(field, name, f"a folder with its weights ({file.name} cannot be read)") from None
    for each in files:
        if not each.is_file():
            raise InputError(field, name, f"a folder with all of its weights ({each.name} is missing)")
        if each.suffix == ".safetensors":
            try:
                with safe_open(each, "np"):
                    pass
            except (OSError, SafetensorError) as error:
                accepted = f"a folder with complete weights ({each.name} is damaged: {first_line(error)})"
                raise InputError(field, name, accepted) from None


def _refused(field: str, name: str, wanted: str, path: str, error: Exception) -> InputError:
    """The fault of a model that could not be opened."""
    if needs_trust(error):
        if field.startswith(("student.", "teacher.ensemble.", "teacher.peers.", "teacher.checkpoints.")):
            side = field.partition(".")[0]
            fix = f"take a {side} without code of its own: only the code of teacher.model can be allowed"
            return InputError(field, name, fix=fix)
        return InputError(field, name, fix=TRUST)
    return InputError(field, name, _reason(wanted, path, error))


def _reason(wanted: str, path: str, error: Exception) -> str:
    """What was wanted, and in a few words why it could not be had."""
    if os.path.exists(path):
        return f"{wanted} ({first_line(error)})"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "an existing folder, or a Hub id in the local cache: the Hub is off (HF_HUB_OFFLINE is set)"
    return f"an existing folder, or a Hub id that can be reached ({first_line(error)})"


def check_head(model: OpenModel, task: Task, any_order: bool = False) -> None:
    """Check that the model has a trained head for the task, with as many labels. Its names for them may be others.

    Args:
        any_order: whether its classes may be in another order than the data's.

    Raises:
        InputError: for a missing head, another number of labels, or, without `any_order`, the same label names in another order.
    """
    classes = model.config.architectures or []
    hint = " (or a teacher.train section, to fine-tune one)" if model.field == "teacher.model" else ""
    if not task.kind.has_head(classes):
        given = f"{model.name} ({', '.join(classes) or 'no class'})"
        what = unsupported_head(classes) if kind_of_head(classes) is None else None
        told = "" if what is None else f"; this one is for {what}, which is not supported"
        raise InputError(model.field, given, f"a ...{task.kind.head_classes[0]} model{hint}{told}")
    if task.is_language_model:
        return
    if model.config.num_labels != task.num_labels:
        raise InputError(
            model.field,
            f"{model.name} with {model.config.num_labels} labels",
            f"a model with {task.num_labels} labels, as many as the data of {task.name} have{hint}",
        )
    if any_order:
        return
    own, names = label_names(model.config) or (), task.label_names or ()
    if same_names(sorted(own, key=str.casefold), sorted(names, key=str.casefold)):  # its names may be others
        raise_all(class_name_faults(own, names, model.field, model.name, hint))


def chosen_dtype(given: str | None, device: torch.device) -> str:
    """The precision of a teacher's weights where it only answers: as given, else bfloat16 on CUDA and float32 elsewhere.

    Raises:
        InputError: naming `dtype`.
    """
    if given not in (None, *DTYPES):
        raise InputError("dtype", given, one_of(DTYPES, str(given)))
    return given or ("bfloat16" if device.type == "cuda" else "float32")


def identity_of(path: str) -> str:
    """The folder that a teacher is known by: a Hub id's is its snapshot in the local cache."""
    if os.path.exists(path):
        return path
    from huggingface_hub import snapshot_download

    return snapshot_download(path, local_files_only=True)
