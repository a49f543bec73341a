"""Inputs made from models alone, for students that have no data to learn from: a way of making them a file.

May import: common, architectures, losses, data, models, responses.
"""
