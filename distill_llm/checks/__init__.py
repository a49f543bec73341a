"""The one door: facts about a recipe or a command in, faults out, before any heavy work.

What a rule needs to know stands with it: `models.limits` has what a model can read, the terms of `losses` what they go with,
`data.kinds` what a task takes, `recipe.pruning` which settings of pruning contradict each other, `training.refusals` what
training refuses. The Python calls ask the same rules under the names of their own arguments. Here they are put together, and
what was opened on the way is handed on, a file for each door:

    recipe    `run`, `distill`: `open_recipe` -> `Opened`
    prune     `prune`: the same, for a recipe that asks for nothing else
    evaluate  `evaluate`: `open_scoring` -> `OpenScoring`
    cache     `cache`: `open_cache` -> `OpenCache`
    profile   `profile`: `open_profile`

`respond` has its door in `responses.opening`, since its Python call needs it, and `push` in `report.hub`.

May import: common, architectures, losses, data, models, pruning, teachers, recipe, training, evaluation, report.
"""
