"""What the user is told of masks that were learnt."""

from collections.abc import Mapping
from typing import Any


def masks_words(told: Mapping[str, Any]) -> str:
    """Where learnt masks came to, on one line.

    Args:
        told: see `LearnedMasks.told`.
    """
    units = " and ".join(f"{count:,} {kind}" for kind, count in told["units"].items())
    blocks = f" and {told['blocks']} whole blocks" if told["blocks"] else ""
    state = f"threshold {told['threshold']:.3g}" if "threshold" in told else ""
    if "lambda_1" in told:
        state = f"lambda {told['lambda_1']:.3g} and {told['lambda_2']:.3g}"
    share = f"{told['share']:.1%} {'expected to stay' if told['by'] == 'l0' else 'kept'}, target {told['target']:.1%}"
    moved = f"the plan keeps {told['kept_closed']} closed units and removes {told['removed_open']} open ones"
    return f"masks of {units}{blocks} learnt by {told['by']}: {share}, {state}; {moved}"
