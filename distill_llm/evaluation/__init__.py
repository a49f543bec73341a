"""How good a model is: metrics that need no network, and running a model over a data set."""

from distill_llm.evaluation.evaluate import evaluate_model, predict
from distill_llm.evaluation.metrics import METRICS, compute_metrics, load_metric

__all__ = ["METRICS", "compute_metrics", "evaluate_model", "load_metric", "predict"]
