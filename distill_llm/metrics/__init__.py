"""Metrics: decorated functions, found by name; none needs a network.

A new one is a function in a file of FILES, or in a new file with a row there; docs/development/add-a-metric.md shows one.

May import: common.
"""

from importlib import import_module

from distill_llm.metrics.registry import METRICS, Metric, find_metric, metric

FILES = ("classes", "values", "texts")
"""Files with metrics, in the order in which messages list them; importing one registers its metrics."""

for _file in FILES:
    import_module(f"{__name__}.{_file}")

__all__ = ["METRICS", "Metric", "find_metric", "metric"]
