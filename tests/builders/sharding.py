"""FSDP2 and ZeRO-3 on processors: accelerate shards on accelerators only."""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from distill_llm import DistillationConfig

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch` sets for it."""


def shard_on_processors() -> None:
    """Tell accelerate that this process has an accelerator, as soon as training arguments have named its device."""
    own = DistillationConfig.__post_init__

    def then_told(config: DistillationConfig) -> None:
        own(config)
        assert config.device.type == "cpu"
        zero = os.environ.get("ACCELERATE_USE_DEEPSPEED")
        PartialState._shared_state["distributed_type"] = (
            DistributedType.DEEPSPEED if zero else DistributedType.MULTI_GPU
        )
        PartialState._shared_state["_cpu"] = not zero

    DistillationConfig.__post_init__ = then_told
