"""Figures, token and attention views, self-contained pages; the only importer of plotly and jinja2."""

from interp.report.attention import attention_view, show_attention
from interp.report.figures import Axis, bars, curves, heatmap, line
from interp.report.html import Section, View, page, write_page
from interp.report.tokens import show_tokens

__all__ = [
    "Axis",
    "Section",
    "View",
    "attention_view",
    "bars",
    "curves",
    "heatmap",
    "line",
    "page",
    "show_attention",
    "show_tokens",
    "write_page",
]
