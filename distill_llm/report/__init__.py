"""The report of a run as a page and as Markdown with its figures, and the student's model card.

May import: common, architectures, metrics, data, models, pruning, recipe, teachers, responses.
"""

from distill_llm.report.card import write_card
from distill_llm.report.page import write_page
from distill_llm.report.report import write_report
from distill_llm.report.tables import retention

__all__ = ["retention", "write_card", "write_page", "write_report"]
