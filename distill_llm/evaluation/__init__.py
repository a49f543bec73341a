"""How good a model is: metrics that need no network, and running a model over a data set.

May import: common, metrics, losses, data, models, responses.
"""

from distill_llm.evaluation.evaluate import compute_metrics, evaluate_model, predict
from distill_llm.metrics import METRICS

__all__ = ["METRICS", "compute_metrics", "evaluate_model", "predict"]
