"""Weights in fewer bits, by torchao: what can be said of a scheme, a model rounded, a model that learns under rounding.

May import: common, architectures, models.
"""
