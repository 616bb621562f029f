"""AxBench's concept data: instructions and answers with and without a concept, as contrasts of one concept each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.core.where import Where
from interp.data.concept import Concept
from interp.data.contrast import Contrast
from interp.data.prompt import Prompt

if TYPE_CHECKING:
    import pandas

__all__ = ["OUTPUT", "AxBench", "load_axbench"]

OUTPUT = "output"
"""Name of the span of the answer in each text."""

_TRAIN, _EVAL = "generate/train_data.parquet", "inference/latent_eval_data.parquet"
_COLUMNS = ("input", "output", "output_concept", "concept_genre", "category", "concept_id")
_POSITIVE, _NEGATIVE, _HARD = "positive", "negative", "hard negative"


@dataclass(frozen=True)
class AxBench:
    """The concepts of one folder.

    Attributes:
        concepts: each with the texts that it is fitted on, the ones held out, and hard negatives.
        numbers: concept_id of each.
        genres: "text", "code" or "math", for each.
        sae_ids: number of the latent that the concept was the label of, for each; -1 where the file says none.
        instructions: instructions of held-out rows, each once, in the order of the file.
        skipped: rows without a text after the instruction, or without an instruction.
    """

    concepts: tuple[Concept, ...]
    numbers: tuple[int, ...]
    genres: tuple[str, ...]
    sae_ids: tuple[int, ...]
    instructions: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, index: int) -> Concept:
        return self.concepts[index]


def load_axbench(
    folder: str | os.PathLike[str],
    *,
    template: str = "{input}\n{output}",
    max_characters: int | None = None,
    limit: int | None = None,
) -> AxBench:
    """Read the concepts of one AxBench folder, such as concept10/prod_2b_l10_v1.

    Texts are instruction and answer in a template; the answer is the span "output", which is where the concept is read
    (`Where(name="output")`, every token of it).

    Args:
        folder: holds generate/train_data.parquet and inference/latent_eval_data.parquet.
        template: how a text is made; {input} and {output} stand in it once each, and {output} last. Give a chat model
            its chat format here.
        max_characters: cut instruction and answer to so many characters each; None keeps them whole.
        limit: read the first so many concepts only.

    Returns:
        The concepts, in the order of their numbers.

    Raises:
        ArtifactError: a file is missing, or lacks a column; says what is there.
        ConfigError: another template, or a number below 1.
        DataError: a concept without training or held-out texts.

    Source: Wu et al. (2025), arXiv 2501.17148, §3 and appendix: negatives of training are those of the concept's
    genre, shared by its concepts, beside those that name the concept, where a folder has such. Departure: the chat
    template is the caller's.
    """
    import pandas

    before, between, after = _template(template)
    for what, given in (("max_characters", max_characters), ("limit", limit)):
        if given is not None and (type(given) is not int or given < 1):
            raise ConfigError(f"{what}={given!r}: expected a whole number ≥ 1, or None")
    root = Path(folder)
    train, held = (_read(root, name) for name in (_TRAIN, _EVAL))
    shape = (before, between, after, max_characters)
    numbers = sorted(int(i) for i in train["concept_id"].unique() if i >= 0)[:limit]
    made, genres, latents, skipped = [], [], [], 0
    for number in numbers:
        own, out = train[train["concept_id"] == number], held[held["concept_id"] == number]
        name, genre = str(own["output_concept"].iloc[0]), str(own["concept_genre"].iloc[0])
        shared = train[(train["concept_id"] < 0) & (train["concept_genre"] == genre)]
        negative = pandas.concat([shared, own[own["category"] != _POSITIVE]])
        sought = [out[out["category"] == kind] for kind in (_POSITIVE, _NEGATIVE, _HARD)]
        parts = [own[own["category"] == _POSITIVE], negative, *sought]
        sides = [_prompts(part, shape) for part in parts]
        skipped += sum(len(part) - len(side) for part, side in zip(parts, sides, strict=True))
        for what, side in zip(("training", "negative training", "held-out", "negative held-out"), sides, strict=False):
            if not side:
                raise DataError(f"concept {number} ({name!r}) of {root} has no {what} text")
        made.append(
            Concept(
                name=name,
                fit=Contrast.make(sides[0], sides[1], paired=False, name=name),
                held_out=Contrast.make(sides[2], sides[3], paired=False, name=name),
                hard=tuple(sides[4]),
                where=Where(name=OUTPUT),
            )
        )
        genres.append(genre)
        latents.append(int(out["sae_id"].iloc[0]) if "sae_id" in out and len(out) else -1)
    if not made:
        raise DataError(f"{root / _TRAIN} has no concept: every concept_id is below 0")
    instructions = tuple(dict.fromkeys(text for text in held["input"] if isinstance(text, str) and text.strip()))
    return AxBench(tuple(made), tuple(numbers), tuple(genres), tuple(latents), instructions, skipped)


def _template(template: str) -> tuple[str, str, str]:
    if template.count("{input}") != 1 or template.count("{output}") != 1:
        raise ConfigError(f"template={template!r}: expected {{input}} and {{output}} in it, once each")
    before, _, rest = template.partition("{input}")
    between, found, after = rest.partition("{output}")
    if not found or not between:
        raise ConfigError(f"template={template!r}: expected {{output}} after {{input}}, with something between them")
    return before, between, after


def _read(root: Path, name: str) -> "pandas.DataFrame":
    import pandas

    path = root / name
    if not path.is_file():
        there = sorted(str(p.relative_to(root)) for p in root.rglob("*.parquet"))[:8] if root.is_dir() else []
        what = f"has {', '.join(there)}" if there else "holds no parquet file" if root.is_dir() else "is no folder"
        raise ArtifactError(f"{path} is not there: {root} {what}; give a folder such as concept10/prod_2b_l10_v1")
    try:
        table = pandas.read_parquet(path)
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path} cannot be read as parquet ({err}); download it again") from err
    lacking = [column for column in _COLUMNS if column not in table.columns]
    if lacking:
        have = ", ".join(map(repr, table.columns))
        raise ArtifactError(f"{path} has no column {lacking[0]!r}; its columns are {have}")
    if not pandas.api.types.is_numeric_dtype(table["concept_id"]):
        raise ArtifactError(f"concept_id of {path} is {table['concept_id'].dtype}; expected numbers, -1 for no concept")
    return table


def _prompts(rows: "pandas.DataFrame", shape: tuple[str, str, str, int | None]) -> Sequence[Any]:
    before, between, after, most = shape
    made = []
    for given, answer in zip(rows["input"], rows["output"], strict=True):
        if not isinstance(given, str) or not isinstance(answer, str):  # a null is no text, and not "nan"
            continue
        answer = answer.strip()[:most].rstrip()
        if not answer:
            continue
        start = f"{before}{given.strip()[:most]}{between}"
        made.append(Prompt(f"{start}{answer}{after}", {OUTPUT: (len(start), len(start) + len(answer))}))
    return made
