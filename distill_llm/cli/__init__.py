"""The command line.

May import: common, measuring, data, models, pruning, teachers, responses, recipe, evaluation, report, export, checks, pipeline.
"""
