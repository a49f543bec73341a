"""Colours of figures and of the page, by the system's setting. Text on its ground has a contrast of at least 4.5, marks of 3."""

LIGHT = {
    "ground": "#f5f7fa",
    "card": "#ffffff",
    "ink": "#1f2328",
    "muted": "#59636e",
    "line": "#dde3ea",
    "teal": "#0e7490",
    "gold": "#a16207",
    "ember": "#be4529",
    "violet": "#7c3aed",
    "green": "#15803d",
    "blue": "#1d60d1",
}
DARK = {
    "ground": "#0d1117",
    "card": "#161b22",
    "ink": "#e6edf3",
    "muted": "#9aa4ae",
    "line": "#313842",
    "teal": "#4cc9dd",
    "gold": "#e3b341",
    "ember": "#ff9374",
    "violet": "#b79aff",
    "green": "#5fd47c",
    "blue": "#7fb6ff",
}
SERIES = ("teal", "ember", "gold", "violet", "green", "blue")
"""Colours of lines, in order."""
