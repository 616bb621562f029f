"""Pairs out of the tables that other tools ship: one row per pair, a clean and a corrupted prompt in its columns."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from interp.core.errors import ArtifactError, DataError, nearest
from interp.data.pairs import PromptPairs

__all__ = ["pairs_from_csv"]

Texts = str | Sequence[str]
Column = str | Callable[[Mapping[str, str]], Texts]
"""A column by name, or a function of the row."""


def pairs_from_csv(
    path: str | os.PathLike[str],
    *,
    clean: Column = "clean",
    corrupted: Column = "corrupted",
    answers: Column = "answer",
    foils: Column | None = None,
    meta: Sequence[str] = (),
) -> PromptPairs:
    """Read pairs from a CSV file with a header.

    `pairs_from_csv("greater_than.csv", answers=lambda row: later(row["label"]), foils=…)` reads what is made of a row;
    columns of token ids are read so with their tokenizer: `lambda row: tokenizer.decode([int(row["id"])])`.

    Args:
        path: the file, in UTF-8.
        clean, corrupted: column of each prompt, or a function of the row that returns a text.
        answers, foils: column of the text that continues it, its leading space included, or a function of the row that
            returns a text or several; no foils by default.
        meta: columns that are kept as facts of the pair.

    Returns:
        The pairs in the order of the file, named after it.

    Raises:
        ArtifactError: no such file, or one that is no table.
        DataError: a column that is not there, a row that lacks a value, or what `PromptPairs.make` refuses.
    """
    rows = _rows(Path(path))
    asked = {"clean": clean, "corrupted": corrupted, "answers": answers} | ({} if foils is None else {"foils": foils})
    names = list(rows[0])
    for column in [*(c for c in asked.values() if isinstance(c, str)), *meta]:
        if column not in names:
            hint = nearest(column, names) or f"its columns are {', '.join(map(repr, names))}"
            raise DataError(f"{path} has no column {column!r}; {hint}")
    columns = {what: [_value(row, i, column) for i, row in enumerate(rows)] for what, column in asked.items()}
    return PromptPairs.make(
        columns["clean"],  # type: ignore[arg-type]  # make says which pair is no text
        columns["corrupted"],  # type: ignore[arg-type]
        columns["answers"],
        columns.get("foils"),
        meta=[{name: row[name] for name in meta} for row in rows],
        name=Path(path).stem,
    )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise ArtifactError(f"{path} cannot be read as a table ({err}); give a CSV file in UTF-8") from err
    if not rows:
        raise ArtifactError(f"{path} has no row below its header; give a table of pairs")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise ArtifactError(f"row {i} of {path} has another number of cells than the header; is a text not quoted?")
    return rows


def _value(row: Mapping[str, str], number: int, column: Column) -> Texts:
    if isinstance(column, str):
        return row[column]
    try:
        return column(row)
    except Exception as err:
        err.add_note(f"raised by the function of row {number}: {dict(row)}")
        raise
