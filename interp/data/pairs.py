"""`PromptPairs`: clean and corrupted prompts with the answers, foils and named positions of each pair."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError, DataError, nearest
from interp.core.metrics import Metric
from interp.data.pair_tokenizing import Problem, tokenize_pairs
from interp.data.pair_tokens import PairTokens
from interp.data.prompt import Pair, Prompt

__all__ = ["FORMAT", "PromptPairs"]

FORMAT = 1
_KIND = "interp.PromptPairs"


@dataclass(frozen=True)
class PromptPairs:
    """Clean and corrupted prompts with answers and foils, independent of any model.

    Make one with `make` or `load`; `check` and `tokens` look at it with a model's tokenizer. `pairs[3]` is a `Pair`;
    `pairs[2:9]`, `pairs[[0, 4]]` and `a + b` are `PromptPairs` again.

    Args:
        examples: the pairs.
        name: what the data is called in results.

    Raises:
        DataError: no pair at all.
    """

    examples: tuple[Pair, ...]
    name: str = "pairs"

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", tuple(self.examples))
        if not self.examples:
            raise DataError(f"{self.name!r} holds no pair; give at least one")
        wrong = next((e for e in self.examples if not isinstance(e, Pair)), None)
        if wrong is not None:
            raise DataError(f"{self.name!r} holds {type(wrong).__name__}: expected Pair; PromptPairs.make takes texts")

    @classmethod
    def make(
        cls,
        clean: str | Prompt | Sequence[str | Prompt],
        corrupted: str | Prompt | Sequence[str | Prompt],
        answers: str | Sequence[str | Sequence[str]],
        foils: str | Sequence[str | Sequence[str]] | None = None,
        *,
        meta: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        name: str = "pairs",
        marked: bool = False,
        hm: Any = None,
    ) -> "PromptPairs":
        """Return pairs from plain lists.

        Args:
            clean: one prompt, or a list of them.
            corrupted: as many.
            answers: for each pair a text or several; for one pair given without a list, its answer or answers.
            foils: the same, or None for none. Leading spaces belong to answers and foils: " Mary" after "gave it to".
            meta: facts for each pair, or the same ones for all.
            name: what the data is called in results.
            marked: read prompts as `Prompt.parse` does: "When {io:Mary} and {s1:John} went".
            hm: a model or tokenizer to check the pairs with at once, as `check` does.

        Raises:
            DataError: lists of different lengths, or whatever `Prompt`, `Pair` and `check` refuse.
        """
        if isinstance(clean, str | Prompt) != isinstance(corrupted, str | Prompt):
            raise DataError("clean and corrupted must both be one prompt, or both be lists of prompts")
        columns: dict[str, list[Any]]
        if isinstance(clean, str | Prompt):
            columns = {"clean": [clean], "corrupted": [corrupted], "answers": [answers], "foils": [foils or ()]}
        else:
            columns = {"clean": list(clean), "corrupted": list(corrupted)}  # type: ignore[arg-type]
            for what, given in (("answers", answers), ("foils", foils)):
                if isinstance(given, str):
                    raise DataError(f"{what}={given!r}: expected one text, or several, for each of {len(clean)} pairs")
                columns[what] = [()] * len(clean) if given is None else list(given)
        n = len(columns["clean"])
        columns["meta"] = [meta or {}] * n if meta is None or isinstance(meta, Mapping) else list(meta)
        if any(len(column) != n for column in columns.values()):
            counts = ", ".join(f"{len(column)} {what}" for what, column in columns.items())
            raise DataError(f"a list has another length than the rest: {counts}; give one of each per pair")
        made = []
        for i, (c, x, a, f, m) in enumerate(zip(*columns.values(), strict=True)):
            try:
                made.append(Pair(_prompt(c, marked), _prompt(x, marked), _texts(a), _texts(f), m))
            except DataError as err:
                raise DataError(f"pair {i}: {err}") from None
        pairs = cls(tuple(made), name)
        if hm is not None:
            pairs.check(hm)
        return pairs

    # -- a sequence of pairs ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> "PromptPairs": ...
    def __getitem__(self, index: int | slice | Sequence[int]) -> "Pair | PromptPairs":
        if isinstance(index, int):
            return self.examples[index]
        chosen = self.examples[index] if isinstance(index, slice) else tuple(self.examples[i] for i in index)
        return PromptPairs(chosen, self.name)

    def __add__(self, other: "PromptPairs") -> "PromptPairs":
        if not isinstance(other, PromptPairs):
            return NotImplemented
        name = self.name if self.name == other.name else f"{self.name} + {other.name}"
        return PromptPairs(self.examples + other.examples, name)

    @property
    def clean(self) -> tuple[Prompt, ...]:
        """The clean prompts."""
        return tuple(e.clean for e in self.examples)

    @property
    def corrupted(self) -> tuple[Prompt, ...]:
        """The corrupted prompts."""
        return tuple(e.corrupted for e in self.examples)

    def swap(self, *, answers: bool = False) -> "PromptPairs":
        """Return the pairs with clean and corrupted prompts exchanged, for noising instead of denoising.

        Args:
            answers: exchange answers and foils too, so that the answers are right for the new clean prompts.

        Raises:
            DataError: answers=True, and a pair has no foils.
        """
        sides = [(e.foils, e.answers) if answers else (e.answers, e.foils) for e in self.examples]
        made = zip(self.examples, sides, strict=True)
        return PromptPairs(tuple(Pair(e.corrupted, e.clean, a, f, e.meta) for e, (a, f) in made), self.name)

    def leaning(self, answers: Sequence[str]) -> "PromptPairs":
        """Return the prompts whose answers, or foils, are these texts, each with them as the answers.

        For steering: whatever a prompt itself calls for, the metric then rises where the model is moved towards these.
        The prompts stay where they are; other pairs are left out.

        Args:
            answers: texts such as " glad", " loved".

        Raises:
            DataError: no pair has one of them, or a pair has some among its answers and some among its foils.
        """
        wanted, made = set(answers), []
        for i, e in enumerate(self):
            right, wrong = set(e.answers) & wanted, set(e.foils) & wanted
            if right and wrong:
                raise DataError(
                    f"pair {i}: {sorted(right)[0]!r} is an answer and {sorted(wrong)[0]!r} a foil; choose one"
                )
            if right or wrong:
                a, f = (e.answers, e.foils) if right else (e.foils, e.answers)
                made.append(Pair(e.clean, e.corrupted, a, f, e.meta))
        if not made:
            known = sorted({t for e in self for t in (*e.answers, *e.foils)})
            shown = ", ".join(map(repr, known[:8])) + (", …" if len(known) > 8 else "")
            raise DataError(f"no pair of {self.name!r} has one of {sorted(wanted)}; its answers and foils are {shown}")
        return PromptPairs(tuple(made), self.name)

    def filter(self, keep: Callable[[Pair], bool]) -> "PromptPairs":
        """Return the pairs for which a function is true.

        Raises:
            DataError: it is true for none.
        """
        kept = tuple(e for e in self.examples if keep(e))
        if not kept:
            raise DataError(f"the filter keeps none of the {len(self)} pairs of {self.name!r}")
        return PromptPairs(kept, self.name)

    def group(self, fact: str) -> "dict[Any, PromptPairs]":
        """Return the pairs by the value of a fact in `meta`, in the order in which values first appear.

        Args:
            fact: its name, such as "template".

        Raises:
            DataError: a pair lacks it.
        """
        groups: dict[Any, list[Pair]] = {}
        for i, e in enumerate(self.examples):
            if fact not in e.meta:
                hint = nearest(fact, e.meta) or f"its facts are: {', '.join(e.meta) or 'none'}"
                raise DataError(f"pair {i} has no fact {fact!r}; {hint}")
            groups.setdefault(e.meta[fact], []).append(e)
        return {value: PromptPairs(tuple(found), self.name) for value, found in groups.items()}

    def sample(self, n: int, *, seed: int = 0) -> "PromptPairs":
        """Return n different pairs, drawn at random; the same ones for the same seed.

        Raises:
            DataError: n is below 1 or above the number of pairs.
        """
        if not 1 <= n <= len(self):
            raise DataError(f"sample({n}) of {len(self)} pairs: expected 1 to {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order[:n].tolist()]

    # -- with a tokenizer ---------------------------------------------------------------------------------------

    def problems(self, hm: Any, *, bos: bool | None = None, same_length: bool = True) -> list[Problem]:
        """Return what is wrong, or worth knowing, about these pairs under a tokenizer.

        `pairs[[i for i in range(len(pairs)) if i not in {p.pair for p in pairs.problems(hm) if p.fatal}]]` are the
        pairs that can be used.

        Args:
            hm: a `HookManager`, or a tokenizer.
            bos: as in `tokens`.
            same_length: whether prompts of different length within a pair are a problem; patching needs equal ones.

        Returns:
            The problems, pair by pair. Fatal: prompts of different length; a span that cuts a token or holds none;
            an answer that the tokenizer does not know, that joins a trailing space of the prompt or is a foil's tokens
            too. Not fatal: an answer of several tokens (metrics use the first), one that begins as a foil does, one
            without a space before it, equal prompts, unknown tokens, spans that do not correspond.
        """
        return tokenize_pairs(_tokenizer_of(hm), self.examples, bos=bos, same_length=same_length)[1]

    def check(self, hm: Any, *, bos: bool | None = None, same_length: bool = True) -> list[Problem]:
        """Refuse pairs that cannot be used under a tokenizer; arguments as in `problems`.

        Returns:
            What is worth knowing although it is not fatal.

        Raises:
            DataError: a fatal problem; the first three are shown, with the tokens.
        """
        found = self.problems(hm, bos=bos, same_length=same_length)
        if any(p.fatal for p in found):
            raise self._refusal(found)
        return found

    def _refusal(self, found: Sequence[Problem]) -> DataError:
        fatal = [p for p in found if p.fatal]
        shown = "\n".join(map(str, fatal[:3]))
        more = f"\n… and {len(fatal) - 3} more; pairs.problems(hm) lists them" if len(fatal) > 3 else ""
        bad = len({p.pair for p in fatal})
        return DataError(f"{bad} of {len(self)} pairs of {self.name!r} cannot be used:\n{shown}{more}")

    def tokens(self, hm: Any, *, side: str = "right", bos: bool | None = None, same_length: bool = True) -> PairTokens:
        """Return the pairs as tokens, with spans as masks, ready for `hm.run`.

        Args:
            hm: a `HookManager`, or a tokenizer.
            side: where pads go, "right" or "left".
            bos: None follows the tokenizer's habit, True puts its BOS first, False leaves special tokens out.
            same_length: refuse prompts of different length within a pair.

        Raises:
            DataError: what `check` refuses, or prompts that do not fit the model.
        """
        if side not in ("left", "right"):
            raise DataError(f"side={side!r}: expected 'left' or 'right'")
        made, found = tokenize_pairs(
            _tokenizer_of(hm), self.examples, bos=bos, side=side, same_length=same_length, name=self.name
        )
        if made is None:
            raise self._refusal(found)
        if hasattr(hm, "to_tokens"):
            for prompts in (made.clean, made.corrupted):
                hm.to_tokens(prompts)
        return made

    def metric(self, hm: Any, kind: str = "logit_diff") -> Metric:
        """Return a function of a run of these pairs, one number per pair; see `PairTokens.metric`.

        Args:
            hm: a `HookManager`, or a tokenizer.
            kind: "logit_diff", "prob_diff", "log_prob" or "rank".
        """
        return self.tokens(hm, same_length=False).metric(kind)

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the pairs as one JSON file; it appears complete or not at all.

        Args:
            path: the file.
            overwrite: replace a file that is there.

        Raises:
            ArtifactError: a file is there.
        """
        if Path(path).exists() and not overwrite:
            raise ArtifactError(f"{path} is there already; pass overwrite=True to replace it, or choose another path")
        body = [
            {
                "clean": {"text": e.clean.text, "spans": e.clean.spans},
                "corrupted": {"text": e.corrupted.text, "spans": e.corrupted.spans},
                "answers": e.answers,
                "foils": e.foils,
                "meta": e.meta,
            }
            for e in self.examples
        ]
        record = {"kind": _KIND, "format": FORMAT, "name": self.name, "pairs": body}
        return atomic_write(path, json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PromptPairs":
        """Read what `save` wrote.

        Raises:
            ArtifactError: no such file, a damaged one, or one of another kind or format.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise ArtifactError(f"{path} cannot be read as JSON ({err}); give the file that save() wrote") from err
        if not isinstance(record, dict) or record.get("kind") != _KIND:
            raise ArtifactError(f"{path} holds no prompt pairs (its kind is not {_KIND!r}); give what save() wrote")
        if record.get("format") != FORMAT:
            raise ArtifactError(
                f"{path} has format {record.get('format')!r} and this version reads {FORMAT}; use the one that wrote it"
            )
        try:
            made = tuple(
                Pair(
                    Prompt(**p["clean"]), Prompt(**p["corrupted"]), _texts(p["answers"]), _texts(p["foils"]), p["meta"]
                )
                for p in record["pairs"]
            )
            return cls(made, record["name"])
        except (KeyError, TypeError, AttributeError, DataError) as err:
            raise ArtifactError(f"{path} is damaged ({type(err).__name__}: {err}); save the pairs again") from err


def _prompt(given: Any, marked: bool) -> Prompt:
    if isinstance(given, Prompt):
        return given
    return Prompt.parse(given) if marked else Prompt(given)


def _texts(given: Any) -> Any:
    return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given


def _tokenizer_of(hm: Any) -> Any:
    """The tokenizer of a manager, or what was given where it is one itself."""
    return hm.tokenizer if hasattr(hm, "to_tokens") else hm
