"""The one door: facts about a recipe or a command in, faults out, before any heavy work.

May import: common, architectures, metrics, losses, measuring, data, models, pruning, teachers, responses, recipe,
training, evaluation, report.
"""
