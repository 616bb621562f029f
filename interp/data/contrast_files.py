"""`contrast_from_file`: texts with labels, in CSV or JSON lines, as a contrast."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from interp.core.errors import DataError, nearest
from interp.data.contrast import Contrast

__all__ = ["SUFFIXES", "contrast_from_file", "contrasts_in_folder"]

SUFFIXES = (".csv", ".tsv", ".jsonl")
"""Kinds of file that are read."""

_TRUE, _FALSE = ("1", "true", "yes", "positive"), ("0", "false", "no", "negative")


def contrast_from_file(
    path: str | os.PathLike[str],
    *,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    positive: str | None = None,
    name: str | None = None,
) -> Contrast:
    """Read texts that have a concept and texts that lack it from a table: a row is a text, its label, and its group.

    Labels are 1 and 0, true and false, yes and no, or positive and negative; others need `positive`, and every other
    label is then negative.

    Args:
        path: a .csv or .tsv file with a header, or a .jsonl file with an object a line; UTF-8.
        text: column of the texts.
        label: column of the labels.
        group: column of what a text belongs to (a template, a source, an author), which a split keeps whole; None takes
            a column named "group" where there is one, and else a group for each text.
        positive: the label of texts that have the concept.
        name: what the concept is called; the file's name by default.

    Returns:
        The contrast, unpaired, in the order of the file.

    Raises:
        DataError: no such file, another kind, a column or a value that is missing, or a side without texts.
    """
    file = Path(path)
    rows = list(_rows(file))
    if not rows:
        raise DataError(f"{file} holds no rows; expected a text and a label in each")
    columns = list(rows[0][1])
    for wanted in (text, label, *([group] if group is not None else [])):
        if wanted not in columns:
            hint = nearest(wanted, columns) or "it has " + ", ".join(columns)
            raise DataError(f"{file} has no column {wanted!r}; {hint}")
    if group is None and "group" in columns:
        group = "group"
    values = sorted({str(_value(row, label, file, line)) for line, row in rows})
    sides: dict[bool, list[tuple[str, Any]]] = {True: [], False: []}
    for line, row in rows:
        belongs = row.get(group) if group is not None else None
        if group is not None and belongs in (None, ""):
            raise DataError(f"{file}, line {line}: no {group!r}; each text needs a group, or none does")
        said = _is_positive(str(_value(row, label, file, line)), positive, values, file)
        sides[said].append((_text(row, text, file, line), belongs))
    if not sides[True] or not sides[False]:
        raise DataError(f"{file}: all labels are {', '.join(values)}; a contrast needs texts of both kinds")
    texts, groups = ([tuple(pair[i] for pair in sides[side]) for side in (True, False)] for i in (0, 1))
    return Contrast.make(
        *texts,
        paired=False,
        groups=None if group is None else (groups[0], groups[1]),
        name=file.stem if name is None else name,
    )


def contrasts_in_folder(
    path: str | os.PathLike[str],
    *,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    positive: str | None = None,
) -> dict[str, Contrast]:
    """Read every table of a folder, each a contrast of its own.

    Args:
        path: the folder.
        text, label, group, positive: as for `contrast_from_file`.

    Returns:
        Name of the file without its ending → contrast, in order of the names.

    Raises:
        DataError: no such folder, none of `SUFFIXES` in it, two files of one name, or a file that cannot be read.
    """
    folder = Path(path)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "no such folder"
        raise DataError(f"{folder} holds no {', '.join(SUFFIXES)} ({held or 'it is empty'})")
    names = [file.stem for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{folder} has two files named {twice!r}; a dataset is called by its file's name")
    return {
        file.stem: contrast_from_file(file, text=text, label=label, group=group, positive=positive) for file in files
    }


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and rows."""
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(
            f"there is no file {file}; {nearest(file.name, beside) or 'give the path of a CSV or JSONL file'}"
        )
    kind = file.suffix.lower()
    if kind not in SUFFIXES:
        raise DataError(f"{file} is none of {', '.join(SUFFIXES)}; write it as one of these")
    try:
        body = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(f"{file} is not UTF-8 ({err}); write it so") from err
    if kind == ".jsonl":
        yield from _json_rows(file, body)
        return
    # Not splitlines: U+2028, U+0085 and their like may stand in a text, and end no line of these formats.
    reader = csv.DictReader(io.StringIO(body), delimiter="\t" if kind == ".tsv" else ",")
    try:
        names = list(reader.fieldnames or ())
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{file} has two columns {twice!r}; give each a name of its own")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{file}, line {reader.line_num}: {len(names)} columns are named, not so many here")
            yield reader.line_num, row
    except csv.Error as err:
        raise DataError(f"{file}, line {reader.line_num}: {err}; is a quote left open?") from err


def _json_rows(file: Path, body: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(body.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as err:
            raise DataError(f"{file}, line {number}: not JSON ({err})") from err
        if not isinstance(row, dict):
            raise DataError(
                f"{file}, line {number}: expected an object with a text and a label, got {type(row).__name__}"
            )
        yield number, row


def _value(row: Mapping[str, Any], column: str, file: Path, line: int) -> Any:
    value = row.get(column)
    if value is None or value == "":
        raise DataError(f"{file}, line {line}: no {column!r}")
    return value


def _text(row: Mapping[str, Any], column: str, file: Path, line: int) -> str:
    value = _value(row, column, file, line)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{file}, line {line}: {column!r} is {value!r:.60}; expected a text")
    return value


def _is_positive(value: str, positive: str | None, values: list[str], file: Path) -> bool:
    if positive is not None:
        if positive not in values:
            raise DataError(f"{file}: no label is {positive!r}; there are {', '.join(values[:8])}")
        return value == positive
    low = value.strip().lower()
    if low not in (*_TRUE, *_FALSE):
        raise DataError(f"{file}: which of the labels {', '.join(values[:8])} has the concept? Give positive=…")
    return low in _TRUE
