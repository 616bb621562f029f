"""Coloured text: one number per token, shown as the token's background."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import DataError, ShapeError
from interp.report.html import View, render, visible

__all__ = ["show_tokens"]

_POSITIVE, _NEGATIVE = "217,100,15", "31,111,201"
_STRONGEST = 0.8


def show_tokens(
    tokens: Sequence[str] | Sequence[Sequence[str]],
    values: Sequence[float] | Float[Tensor, "*batch pos"] | Int[Tensor, "*batch pos"] | Sequence[Sequence[float]],
    *,
    title: str = "",
    unit: str = "",
    limit: float | None = None,
) -> View:
    """Show text with a number behind every token: orange above zero, blue below, clear at zero.

    Args:
        tokens: Text of each token, one row or several (such as `run.str_tokens`).
        values: A number per token, in the same form; rows of unequal length may be padded at the end of a tensor.
            NaN means no value, and is drawn with a dotted underline.
        title: What the numbers are.
        unit: Their unit, shown when hovering.
        limit: The absolute value drawn strongest, the same for all rows; None takes the largest finite one.

    Returns:
        A view: it displays itself in a notebook, `to_html(path)` writes a page, `str()` gives text.

    Raises:
        DataError: No tokens, or a limit that is not above zero.
        ShapeError: Values that do not fit the tokens.
    """
    rows = _rows(tokens)
    numbers = _numbers(values, rows)
    finite = [abs(v) for row in numbers for v in row if math.isfinite(v)]
    if limit is not None and not (limit > 0 and math.isfinite(limit)):
        raise DataError(f"limit={limit!r} must be a number above zero; leave it out to take the largest value")
    top = limit if limit is not None else max(finite, default=0.0) or 1.0
    cells = [[_cell(t, v, top, unit) for t, v in zip(r, n, strict=True)] for r, n in zip(rows, numbers, strict=True)]
    signed = any(v < 0 for row in numbers for v in row)
    heading = title or "Values per token"
    scale = {"low": _number(-top) if signed else "0", "high": _number(top) + (f" {unit}" if unit else "")}
    fragment = render("tokens.html.j2", {"rows": cells, "title": title, "signed": signed, **scale})
    return View(heading, fragment, _as_text(rows, numbers))


def _rows(tokens: Any) -> list[list[str]]:
    if isinstance(tokens, str):
        raise DataError("tokens is one string; give a list of tokens, such as hm.to_str_tokens(text)")
    rows = [list(tokens)] if all(isinstance(t, str) for t in tokens) else [list(row) for row in tokens]
    if not rows or not all(rows):
        raise DataError("no tokens to show; give at least one token a row")
    return rows


def _numbers(values: Any, rows: list[list[str]]) -> list[list[float]]:
    if isinstance(values, Tensor):
        grid = values.detach().to(torch.float64).cpu()
        if grid.ndim == 1:
            grid = grid[None]
        # A batch is as wide as its longest row; what lies beyond a shorter row is padding.
        fits = grid.ndim == 2 and grid.shape[0] == len(rows) and grid.shape[1] == max(map(len, rows))
        if not fits:
            shape = f"{len(rows)} rows of {', '.join(str(len(r)) for r in rows[:6])} tokens"
            raise ShapeError(f"values {tuple(values.shape)} do not fit {shape}; give one number per token")
        return [row[: len(r)] for row, r in zip(grid.tolist(), rows, strict=True)]
    nested = [list(v) for v in values] if any(isinstance(v, Sequence | Tensor) for v in values) else [list(values)]
    if [len(v) for v in nested] != [len(r) for r in rows]:
        raise ShapeError(
            f"values have {[len(v) for v in nested]} numbers a row, tokens {[len(r) for r in rows]}; give one per token"
        )
    return [[float(v) for v in row] for row in nested]


def _cell(token: str, value: float, top: float, unit: str) -> dict[str, Any]:
    text = visible(token)
    missing = math.isnan(value)
    share = 0.0 if missing else min(abs(value) / top, 1.0)
    colour = _NEGATIVE if value < 0 else _POSITIVE
    shown = "no value" if missing else _number(value) + (f" {unit}" if unit else "")
    return {
        "text": text,
        "hover": f"{text!r}: {shown}",
        "colour": f"rgba({colour},{_STRONGEST * share:.3f})",
        "missing": missing,
        "breaks": token.count("\n"),
    }


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _as_text(rows: list[list[str]], numbers: list[list[float]]) -> str:
    blocks = []
    for row, values in zip(rows, numbers, strict=True):
        shown = [visible(t) for t in row]
        width = max(map(len, shown))
        blocks.append("\n".join(f"{t:<{width}}  {v:.4g}" for t, v in zip(shown, values, strict=True)))
    return "\n\n".join(blocks)
