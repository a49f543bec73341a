"""The terms of a loss, a file each; BUILT_IN is their order in objectives, logs and messages.

A new term is a file beside these and its name in BUILT_IN; outside of the package, a module that is imported before the
objective is read (docs/development/add-a-loss.md).
"""

BUILT_IN = (
    "labels",
    "exits",
    "smoothing",
    "logits",
    "cross_tokenizer",
    "distillm2",
    "ranking",
    "focal",
    "own_temperature",
    "embeddings",
    "hidden",
    "rkd_distance",
    "rkd_angle",
    "similarity",
    "correlation",
    "channels",
    "flow",
    "contrast",
    "qud",
    "adadistill",
    "attention",
    "relations",
    "neurons",
    "gradients",
)
