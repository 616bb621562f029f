"""Loaders of the files that papers on steering ship: refusal splits, representation reading, word pairs, A/B questions.

Nothing of them is in this package; each loader reads a folder that the user has.
"""

import csv
import io
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.core.errors import ArtifactError, ConfigError, DataError, nearest
from interp.data.ab_questions import ABQuestions
from interp.data.contrast import Contrast

__all__ = [
    "EMOTIONS",
    "SPLITS",
    "RefusalSplits",
    "load_ab_questions",
    "load_refusal_splits",
    "load_repe",
    "load_word_pairs",
]

SPLITS = ("train", "val", "test")

EMOTIONS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")
"""The emotions of which representation reading ships scenarios."""


@dataclass(frozen=True)
class RefusalSplits:
    """Harmful and harmless instructions in splits, as a folder has them.

    Attributes:
        harmful: split → instructions.
        harmless: split → instructions.
        categories: split → category of each harmful instruction; None where the file says none.
        folder: where they were read, for messages.
    """

    harmful: Mapping[str, tuple[str, ...]]
    harmless: Mapping[str, tuple[str, ...]]
    categories: Mapping[str, tuple[str | None, ...]]
    folder: str = ""

    def contrast(self, split: str = "train", *, n: int | None = None, seed: int = 0) -> Contrast:
        """Return harmful against harmless instructions of one split, as many of one as of the other.

        Args:
            split: one of `SPLITS`.
            n: instructions per side, drawn at random; as many as the smaller side has by default.
            seed: of the draw.

        Raises:
            ConfigError: no such split.
            DataError: the folder lacks a file of it, or holds fewer instructions.
        """
        if split not in SPLITS:
            raise ConfigError(f"split={split!r}: {nearest(split, SPLITS) or 'expected one of ' + ', '.join(SPLITS)}")
        sides = []
        for kind, held in (("harmful", self.harmful), ("harmless", self.harmless)):
            if split not in held:
                there = ", ".join(f"{kind}_{s}.json" for s in held)
                raise DataError(f"{self.folder} has no {kind}_{split}.json; of that kind it has {there or 'none'}")
            sides.append(held[split])
        size = min(map(len, sides)) if n is None else n
        if not 1 <= size <= min(map(len, sides)):
            raise DataError(f"n={n}: {split} has {len(sides[0])} harmful and {len(sides[1])} harmless instructions")
        draw = random.Random(f"refusal/{split}/{seed}")
        drawn = [draw.sample(side, size) for side in sides]
        return Contrast.make(*drawn, paired=False, name=f"harmful ({split})")


def load_ab_questions(path: str | os.PathLike[str]) -> dict[str, ABQuestions]:
    """Read A/B questions, one behaviour a file, in the format of CAA and of Anthropic's model-written evaluations.

    Args:
        path: a .json or .jsonl file, or a folder of them, such as human_generated_evals.

    Returns:
        Behaviour (the file's name) → its questions.

    Raises:
        ArtifactError: nothing there, or a file of another form (names it, and what is there).
    """
    root = Path(path)
    files = sorted(f for f in root.iterdir() if f.suffix in (".json", ".jsonl")) if root.is_dir() else [root]
    if not files:
        raise ArtifactError(f"{root} has no .json or .jsonl file; {_listing(root)}")
    for file in files:
        _records(file, ("question", "answer_matching_behavior", "answer_not_matching_behavior"), lists=True)
    return {file.stem: ABQuestions.from_json(file) for file in files}


def load_refusal_splits(folder: str | os.PathLike[str]) -> RefusalSplits:
    """Read harmful_train.json, harmless_train.json and so on, as the refusal-direction repository has them.

    Args:
        folder: dataset/splits of that repository, or a folder above it. Files that are absent are said when asked for.

    Raises:
        ArtifactError: no folder, none of the files, or one of another form (names it, and what is there).

    Source: data format of Arditi et al. (2024), arXiv 2406.11717: a list of {"instruction", "category"}.
    """
    root = _folder_with(folder, ("", "splits", "dataset/splits"), "harmful_*.json")
    found: dict[str, dict[str, tuple[str, ...]]] = {"harmful": {}, "harmless": {}}
    categories: dict[str, tuple[str | None, ...]] = {}
    for kind, held in found.items():
        for split in SPLITS:
            path = root / f"{kind}_{split}.json"
            if path.is_file():
                rows = _records(path, ("instruction",))
                held[split] = tuple(dict.fromkeys(row["instruction"] for row in rows))
                if kind == "harmful":
                    by_text = {row["instruction"]: row.get("category") for row in rows}
                    categories[split] = tuple(by_text[text] for text in held[split])
    return RefusalSplits(found["harmful"], found["harmless"], categories, str(root))


def load_repe(folder: str | os.PathLike[str]) -> dict[str, Contrast]:
    """Read the emotions and the true and false facts of representation reading as contrasts.

    Args:
        folder: data of that repository, or a folder above it.

    Returns:
        An emotion's name → its scenarios against those of all other emotions; "facts" → true against false
        statements. What the folder lacks is left out.

    Raises:
        ArtifactError: no folder, none of the files, or one of another form (names it, and what is there).

    Source: data of Zou et al. (2023), arXiv 2310.01405, §5.1 and §6.1. Departure: scenarios that stand under two
    emotions are left out of the negative side, the files of mixed emotions are not read, and a statement that stands
    twice counts once, or not at all where it is called true and false.
    """
    root = _folder_with(folder, ("", "data"), "emotions/*.json", "facts/*.csv")
    made: dict[str, Contrast] = {}
    texts: dict[str, tuple[str, ...]] = {}
    for name in EMOTIONS:
        path = root / "emotions" / f"{name}.json"
        if path.is_file():
            texts[name] = tuple(dict.fromkeys(_texts(path)))
    for name, own in texts.items():
        others = [t for other, held in texts.items() if other != name for t in held if t not in own]
        if others:
            made[name] = Contrast.make(own, others, paired=False, name=name)
    facts = root / "facts" / "facts_true_false.csv"
    if facts.is_file():
        made["facts"] = _facts(facts)
    if not made:
        raise ArtifactError(f"{root} has neither two emotions nor facts_true_false.csv; {_listing(root)}")
    return made


def load_word_pairs(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Read counterfactual word pairs, one concept a file: two words a line, parted by a tab.

    Args:
        path: a file, or a folder of .txt files named such as "[male - female].txt".

    Returns:
        Concept ("male - female") → its pairs, without a leading space; `causal_geometry` says which are single tokens.

    Raises:
        ArtifactError: nothing there, or a line that is no pair (names file and line).

    Source: format of Park et al. (2023), arXiv 2311.03658, word_pairs.
    """
    root = Path(path)
    files = sorted(root.glob("*.txt")) if root.is_dir() else [root]
    if not files or not all(f.is_file() for f in files):
        raise ArtifactError(f"{root} is no file of word pairs and no folder with .txt files; {_listing(root)}")
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for file in files:
        pairs: dict[tuple[str, str], None] = {}
        for i, line in enumerate(_read(file).splitlines(), 1):
            if not line.strip():
                continue
            words = [w.strip() for w in (line.split("\t") if "\t" in line else line.split())]
            if len(words) != 2 or not all(words):
                raise ArtifactError(f"line {i} of {file} is {line!r}; expected two words parted by a tab")
            pairs[words[0], words[1]] = None
        if not pairs:
            raise ArtifactError(f"{file} holds no pair of words; expected two words a line, parted by a tab")
        found[file.stem.strip().removeprefix("[").removesuffix("]").strip()] = tuple(pairs)
    return found


def _records(file: Path, columns: Sequence[str], *, lists: bool = False) -> list[dict[str, Any]]:
    """A list of objects from a .json or .jsonl file, each with certain texts, or lists, that are not empty."""
    text = _read(file)
    lines = [line for line in text.split("\n") if line.strip()]  # a text may hold U+2028, which ends no line
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except ValueError as err:
        raise ArtifactError(f"{file} is not valid JSON ({err}); give the file as it was published") from err
    if not isinstance(rows, list) or not rows:
        raise ArtifactError(f"{file} holds {_kind(rows)}; expected a list of objects with {', '.join(columns)}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ArtifactError(f"entry {i} of {file} is {_kind(row)}; expected an object with {', '.join(columns)}")
        for name in columns:
            if name not in row:
                raise ArtifactError(f"entry {i} of {file} has no {name!r}; it has {', '.join(map(repr, row))}")
            value = row[name].strip() if isinstance(row[name], str) else row[name] if lists else None
            if not value or not isinstance(value, str | list):
                raise ArtifactError(f"{name!r} of entry {i} of {file} is {row[name]!r:.60}; expected a text")
    return rows


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | dict) else "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{path} cannot be read ({err}); {_listing(path.parent)}") from err


def _facts(path: Path) -> Contrast:
    sides: dict[str, dict[str, None]] = {"1": {}, "0": {}}
    for i, row in enumerate(_table(path, ("statement", "label"))):
        label = row["label"].strip()
        if label not in sides:
            raise ArtifactError(f"row {i} of {path} has the label {label!r}; expected 1 (true) or 0 (false)")
        sides[label][row["statement"]] = None
    true, false = ([t for t in sides[a] if t not in sides[b]] for a, b in ("10", "01"))
    if not true or not false:
        raise ArtifactError(f"{path} has {len(true)} true and {len(false)} false statements; expected both")
    return Contrast.make(true, false, paired=False, name="true statement")


def _texts(path: Path) -> list[str]:
    try:
        rows = json.loads(_read(path))
    except ValueError as err:
        raise ArtifactError(f"{path} is not valid JSON ({err}); give the file as it was published") from err
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        raise ArtifactError(f"{path} holds {_kind(rows)}; expected a list of texts")
    return [row for row in rows if row.strip()]


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(_read(path))))
    except csv.Error as err:
        raise ArtifactError(f"{path} cannot be read as CSV ({err}); give the file as it was published") from err
    there = list(rows[0]) if rows else []
    for name in columns:
        if name not in there:
            raise ArtifactError(f"{path} has no column {name!r}; {_columns(there)}")
    for i, row in enumerate(rows):
        if any(not row[name] for name in columns):
            raise ArtifactError(f"row {i} of {path} lacks one of {', '.join(columns)}; it is {row}")
    return rows


def _columns(names: Sequence[str]) -> str:
    return f"its columns are {', '.join(map(repr, names))}" if names else "it has no row"


def _folder_with(folder: str | os.PathLike[str], below: Sequence[str], *patterns: str) -> Path:
    """The first of some folders that holds a file of one of the patterns."""
    root = Path(folder)
    if not root.is_dir():
        raise ArtifactError(f"{root} is no folder; {_listing(root.parent)}")
    for name in below:
        if any(next((root / name).glob(pattern), None) for pattern in patterns):
            return root / name
    raise ArtifactError(f"{root} has no {' or '.join(patterns)}; {_listing(root)}")


def _listing(folder: Path) -> str:
    """What a folder has, for messages."""
    if not folder.is_dir():
        return f"{folder} is no folder either"
    names = sorted(p.name for p in folder.iterdir())
    return f"{folder} has {', '.join(names[:12]) or 'nothing'}{', …' if len(names) > 12 else ''}"
