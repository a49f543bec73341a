"""The command line.

May import: common, metrics, measuring, data, models, pruning, quantizing, teachers, responses, recipe, evaluation, report,
export, checks, drafting, pipeline.
"""
