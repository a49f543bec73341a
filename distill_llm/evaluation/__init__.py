"""How good a model is: it is run over the rows of a task, and its answers are scored.

May import: common, architectures, metrics, losses, data, models, responses.
"""

from distill_llm.evaluation.evaluate import compute_metrics, evaluate_model, predict
from distill_llm.metrics import METRICS

__all__ = ["METRICS", "compute_metrics", "evaluate_model", "predict"]
