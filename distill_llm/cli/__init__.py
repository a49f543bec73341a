"""The command line.

May import: common, architectures, metrics, losses, measuring, data, models, pruning, teachers, responses, recipe,
training, evaluation, report, checks, pipeline.
"""
