"""Single weights that become zero: which of them, by what criterion, in which pattern.

May import of pruning: statistics.
"""
