"""Progress bars, all of which `distill-llm --quiet` (TQDM_DISABLE=1) keeps away."""

import os
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar, if it is to be shown and the environment does not forbid it.

    Args:
        args, options: of tqdm.
    """
    options["disable"] = not shown or os.environ.get("TQDM_DISABLE") == "1"
    return tqdm(*args, **options)
