"""A run: its stages, their state on disk, how it goes on after a stop.

May import: common, architectures, metrics, losses, measuring, data, models, pruning, quantizing, teachers, synthesis, recipe,
training, evaluation, report, export, checks.
"""
