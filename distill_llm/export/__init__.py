"""Students written for other programs: a file per format.

May import: common, architectures, models.
"""

from distill_llm.export.formats import FORMATS, Exported, Format, export, find_format

__all__ = ["FORMATS", "Exported", "Format", "export", "find_format"]
