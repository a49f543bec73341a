"""Lines that tell the user what was done with the input, where nothing is wrong with it."""

import logging
import os

from distill_llm.common.errors import cut

LOGGER = logging.getLogger("distill_llm")


def tell(line: str) -> None:
    """Print a line on stderr, from the first process (through `logging`, so that a program can take it)."""
    if os.environ.get("RANK", "0") == "0":
        LOGGER.warning(cut(" ".join(line.split())))
