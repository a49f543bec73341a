"""The checks of a recipe or a command before any heavy work. Each module is the "door" of a command.

The rules themselves stand elsewhere: `models.limits` says what a model can read, the terms of `losses` say what they go with,
`data.kinds` says what a task takes, `recipe.pruning` says which of its settings contradict each other, and `training.refusals`
says what training refuses. Python calls use the same rules under the names of their own arguments. A door here opens models and
rows, asks all rules that concern the command, and returns what it opened:

    recipe    `run`, `distill`: `open_recipe` -> `Opened`
    fine_tuning  `glue`: `open_fine_tuning` -> `Opened`, of a recipe whose teacher alone is trained
    prune     `prune`: the same, for a recipe that only prunes
    evaluate  `evaluate`: `open_scoring` -> `OpenScoring`
    cache     `cache`: `open_cache` -> `OpenCache`
    profile   `profile`: `open_profile`

The door of `respond` is in `responses.door`, because its Python call needs it; the door of `push` is in `report.hub`.

May import: common, architectures, losses, data, models, pruning, quantizing, teachers, synthesis, recipe, training,
evaluation, report, export.
"""
