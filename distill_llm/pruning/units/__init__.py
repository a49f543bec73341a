"""Kinds of units (heads, neurons, channels, ...), a file each, and their table; how many a model has, and what each costs.

May import of pruning: nothing.
"""
