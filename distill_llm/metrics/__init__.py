"""Metric functions and their table; none needs a network.

May import: common.
"""
