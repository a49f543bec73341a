"""Drafts of recipes: what a model and a file of data say about the task, the columns and the settings.

May import: common, architectures, measuring, data, models, pruning, checks.
"""
