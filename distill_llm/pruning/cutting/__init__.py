"""Removing what a plan removes, or masking it; whether the result is a stock model.

May import of pruning: units, plan, statistics, compensation.
"""
