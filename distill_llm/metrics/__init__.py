"""Metrics: decorated functions, found by name; none needs a network.

May import: common.
"""

from distill_llm.metrics import classes, texts, values  # noqa: F401  (a row for each file with metrics: importing it registers them)
from distill_llm.metrics.registry import METRICS, Metric, find_metric, metric

__all__ = ["METRICS", "Metric", "find_metric", "metric"]
