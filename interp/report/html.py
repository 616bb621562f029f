"""Pages that hold everything they show: no file beside them, no request to anywhere, hostile text inert."""

import functools
import html
import importlib.resources
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from interp.core.disk import atomic_write
from interp.core.errors import DataError
from interp.core.result import Result

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Section",
    "View",
    "json_block",
    "page",
    "render",
    "summary_fragment",
    "visible",
    "write_page",
    "write_result",
]

TABLE_ROWS = 200
# A column with a text of more characters is set as text.
_LONG_TEXT = 32
_FIGURE_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "plotlyServerURL": "",
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}


@dataclass(frozen=True, eq=False)
class View:
    """A piece of HTML that shows itself in a notebook, writes itself as a page, and prints as text.

    Attributes:
        title: What it shows.
        fragment: Its HTML, already escaped.
        text: The same for a terminal.
        height: Height in CSS pixels of the frame that isolates its script in a notebook; None when it has no script.
    """

    title: str
    fragment: Markup
    text: str
    height: int | None = None

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page, in one step; parent folders are made.

        Args:
            path: File to write.

        Returns:
            The path.
        """
        return write_page(path, self.title, [Section("", self)])

    def _repr_html_(self) -> str:
        if self.height is None:
            return str(self.fragment)
        framed = html.escape(page(self.title, [Section("", self)], framed=True))
        attributes = f'sandbox="allow-scripts" title="{html.escape(self.title)}"'
        return f'<iframe {attributes} style="width:100%;height:{self.height}px;border:0" srcdoc="{framed}"></iframe>'

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"View({self.title!r}); display it in a notebook, or .to_html(path)"


@dataclass(frozen=True, eq=False)
class Section:
    """One part of a page.

    Attributes:
        title: Heading; empty for none.
        body: Text (escaped, line breaks kept), a plotly Figure, a `View` or a pandas DataFrame.
        note: A sentence under the heading.
        folded: Whether the body is behind a click.
    """

    title: str
    body: "str | View | pandas.DataFrame | Any"
    note: str = ""
    folded: bool = False


def page(title: str, sections: Sequence[Section], *, subtitle: str = "", framed: bool = False) -> str:
    """Return a whole HTML document.

    Args:
        title: Heading of the page.
        sections: Its parts, in order.
        subtitle: A line under the heading.
        framed: Leave the heading and the outer margin out, for a frame in a notebook.

    Returns:
        The document. Its content-security policy forbids every request; plotly.js (5 MB) is inside when a figure is.
    """
    parts, with_plotly = [], False
    for number, section in enumerate(sections):
        body, is_figure = _body(section.body, number)
        with_plotly |= is_figure
        parts.append({"title": section.title, "note": section.note, "folded": section.folded, "body": body})
    script = Markup(_plotly_js()) if with_plotly else Markup("")
    # A plain str: `Markup` would escape whatever its methods are given.
    values = {"title": title, "subtitle": subtitle, "sections": parts, "plotly": script, "framed": framed}
    return str(render("page.html.j2", values))


def write_page(path: str | os.PathLike[str], title: str, sections: Sequence[Section], *, subtitle: str = "") -> Path:
    """Write a self-contained page; an existing file is replaced in one step.

    Args:
        path: File to write; parent folders are made.
        title: Heading of the page.
        sections: Its parts, in order.
        subtitle: A line under the heading.

    Returns:
        The path.
    """
    return atomic_write(path, page(title, sections, subtitle=subtitle))


def write_result(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write a result's page: summary, figure, table, provenance.

    Args:
        result: Any result.
        path: File to write.

    Returns:
        The path.
    """
    frame = result.to_frame()
    cut = f"the first {TABLE_ROWS} of {len(frame):,} rows; to_frame() has them all" if len(frame) > TABLE_ROWS else ""
    source = result.provenance
    known = {
        "model": source.model,
        "revision": source.revision,
        "configuration": source.config_hash,
        "data": source.data_hash,
        "seed": source.seed,
        **{f"setting: {k}": v for k, v in source.settings.items()},
        **{f"version: {k}": v for k, v in source.versions.items()},
    }
    lines = "\n".join(f"{name}: {value}" for name, value in known.items() if value is not None)
    sections = [
        Section("", result.summary()),
        Section("", result.plot()),
        *(Section(title, part) for title, part in result.page_parts()),
        Section("Values", frame.head(TABLE_ROWS), note=cut, folded=True),
        Section("Provenance", lines, folded=True),
    ]
    return write_page(path, result.title, sections, subtitle=source.model)


def summary_fragment(result: Result) -> str:
    """Return a result's summary as HTML for a notebook."""
    text = html.escape(result.summary())
    return (
        f'<div><b>{html.escape(result.title)}</b><div style="white-space:pre-wrap;margin-top:.3em">{text}</div></div>'
    )


def render(template: str, values: Mapping[str, Any]) -> Markup:
    """Fill one of this folder's templates.

    Args:
        template: Its file name.
        values: What it names; escaped unless they are `Markup`.
    """
    return Markup(_environment().get_template(template).render(values))


def json_block(value: Any) -> Markup:
    """Return JSON that may stand inside a `<script>` element, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def visible(token: str) -> str:
    """Return a token's text with line breaks, tabs and unprintable characters made visible."""
    shown = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\ufffd": "�", "\xa0": "⍽"}
    text = "".join(shown.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in token)
    return text or "∅"


def _body(body: Any, number: int) -> tuple[Markup, bool]:
    if isinstance(body, str):
        return Markup('<p class="text">{}</p>').format(body), False
    if isinstance(body, View):
        return body.fragment, False
    if hasattr(body, "to_plotly_json"):
        # A fixed id: the same figure gives the same bytes.
        inner = body.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{number}", config=_FIGURE_CONFIG)
        return Markup('<div class="figure">{}</div>').format(Markup(inner)), True
    if hasattr(body, "to_html") and hasattr(body, "columns"):
        table = body.to_html(index=False, escape=True, border=0, float_format=lambda x: f"{x:.4g}", na_rep="–")
        return Markup('<div class="table">{}</div>').format(Markup(_with_words(table, body))), False
    raise DataError(f"a section's body is a {type(body).__name__}; give text, a plotly Figure, a View or a DataFrame")


def _with_words(table: str, frame: "pandas.DataFrame") -> str:
    """Mark the cells of columns that hold long text: they are set as text, and wrap."""
    held = [[str(value) for value in frame.iloc[:, i] if isinstance(value, str)] for i in range(frame.shape[1])]
    wide = itertools.cycle([max(map(len, column), default=0) > _LONG_TEXT for column in held])
    if frame.columns.nlevels > 1:
        return table
    return re.sub(r"<t([dh])>", lambda cell: f'<t{cell[1]} class="words">' if next(wide) else cell[0], table)


@functools.cache
def _environment() -> jinja2.Environment:
    folder = importlib.resources.files("interp.report") / "templates"
    sources = {
        entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".j2")
    }
    loader = jinja2.DictLoader(sources)
    return jinja2.Environment(autoescape=True, loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True)


@functools.cache
def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
