"""Induction heads: scores of every head on repeated random tokens, with their null control.

Source: Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv 2209.11895, prefix-matching score.
Departures: two copies rather than four, tokens distinct within a copy, so that each token has exactly one earlier
occurrence and mean and mass over occurrences agree; tokens are drawn from the whole vocabulary (rare and common ones
included); the paper's text names the position *before* its own intent, so the offset is an argument here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.result import Provenance, Result

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["InductionScores", "induction_scores"]

_SCORES = ("induction", "duplicate", "previous_token", "null")
# Patterns are held for so many layers at once as fit here.
_PATTERN_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class InductionScores(Result):
    """Mean attention of every head to the places that define it; each score is in [0, 1].

    Attributes:
        induction: From a token of the second copy to the token `offset` after its occurrence in the first.
        duplicate: From a token of the second copy to its own occurrence in the first (offset 0).
        previous_token: From any token to the one before, on sequences without repetition.
        null: What `induction` measures, at the same places of sequences without repetition.
        offset: Places after the earlier occurrence; 1 is what an induction head attends to.
        seq_len: Tokens in one copy.
        n_seqs: Sequences averaged over.
    """

    title: ClassVar[str] = "Induction heads"
    induction: Float[Tensor, "layer n_heads"]
    duplicate: Float[Tensor, "layer n_heads"]
    previous_token: Float[Tensor, "layer n_heads"]
    null: Float[Tensor, "layer n_heads"]
    offset: int
    seq_len: int
    n_seqs: int

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per head."""
        import pandas as pd

        layers, heads = self.induction.shape
        places = [(layer, head) for layer in range(layers) for head in range(heads)]
        columns = {name: [float(getattr(self, name)[at]) for at in places] for name in _SCORES}
        return pd.DataFrame({"layer": [p[0] for p in places], "head": [p[1] for p in places], **columns})

    def plot(self, *, score: str = "induction") -> "plotly.graph_objects.Figure":
        """Draw one score as layers × heads.

        Args:
            score: "induction", "duplicate", "previous_token" or "null".
        """
        from interp.report.figures import Axis, heatmap

        if score not in _SCORES:
            raise ConfigError(f"score={score!r}: expected one of {', '.join(_SCORES)}")
        title = {"induction": f"Induction score (offset {self.offset})", "null": "Null control of the induction score"}
        values: Tensor = getattr(self, score)
        layers, heads = values.shape
        hover = [
            [", ".join(f"{n} {float(getattr(self, n)[layer, head]):.3f}" for n in _SCORES) for head in range(heads)]
            for layer in range(layers)
        ]
        name = title.get(score, score.replace("_", " ").capitalize() + " score")
        return heatmap(values, rows=Axis("layer"), columns=Axis("head"), title=name, value="attention", hover=hover)

    def summary(self) -> str:
        """Name the strongest heads of each kind."""
        lines = [f"{self.n_seqs} sequences of 2 × {self.seq_len} random tokens, offset {self.offset}"]
        for name in ("induction", "duplicate", "previous_token"):
            values: Tensor = getattr(self, name)
            best = values.flatten().topk(min(3, values.numel())).indices.tolist()
            heads = [divmod(i, values.shape[1]) for i in best]
            lines.append(
                f"{name}: " + ", ".join(f"L{layer}H{head} {float(values[layer, head]):.2f}" for layer, head in heads)
            )
        lines.append(f"null control: at most {float(self.null.max()):.2f}")
        return "\n".join(lines)


def induction_scores(
    hm: HookManager,
    *,
    seq_len: int = 25,
    n_seqs: int = 10,
    seed: int = 0,
    offset: int = 1,
    bos: bool | None = None,
    write: Sequence[Intervention] = (),
    batch_size: int = 10,
) -> InductionScores:
    """Score every head on `[BOS] s s`, with s random distinct tokens, and on as many tokens without repetition.

    With T = `seq_len` and s starting at position b (1 with BOS, else 0), the query at b + T + i attends to the key at
    b + i + offset, averaged over all i whose key is neither before b nor after the query. Memory: the patterns of as
    many layers as fit 256 MiB, at least one: 4 · batch_size · n_heads · (2T + 1)² bytes a layer; one forward for each
    such group.

    Args:
        hm: The model.
        seq_len: Tokens in one copy, T.
        n_seqs: Sequences to average over.
        seed: Draws the tokens, from the vocabulary without special tokens.
        offset: 1 is what follows the earlier occurrence, 0 the occurrence itself, −1 what precedes it.
        bos: Whether a BOS comes first; None follows the tokenizer's own habit.
        write: Edits to make meanwhile, such as ablations; the scores are those of the edited model.
        batch_size: Sequences per forward.

    Returns:
        Scores [layer n_heads] on the host.

    Raises:
        ConfigError: Lengths or an offset that leave nothing to score.
        DataError: A vocabulary too small for distinct tokens, or no BOS where one was asked.

    Source: Olsson et al. (2022), appendix on prefix matching; departures in the module's text.
    """
    if seq_len < 2 or n_seqs < 1 or batch_size < 1 or not -seq_len < offset < seq_len:
        raise ConfigError(
            f"seq_len={seq_len}, n_seqs={n_seqs}, batch_size={batch_size}, offset={offset}: expected seq_len ≥ 2, "
            "the others ≥ 1 and |offset| < seq_len"
        )
    start = _bos_ids(hm, bos)
    repeated, fresh = _sequences(hm, seq_len, n_seqs, seed, start)
    b = len(start)
    induction, null = (_Score(b, seq_len, offset) for _ in range(2))
    duplicate, previous = _Score(b, seq_len, 0), _Score(b, seq_len, None)
    for layer, pattern in _patterns(hm, repeated, write, batch_size):
        induction.add(layer, pattern)
        duplicate.add(layer, pattern)
    for layer, pattern in _patterns(hm, fresh, write, batch_size):
        null.add(layer, pattern)
        previous.add(layer, pattern)
    settings = {
        "seq_len": seq_len,
        "n_seqs": n_seqs,
        "offset": offset,
        "bos": bool(start),
        "write": [f"{type(w).__name__} at {w.site}" for w in write],
    }
    return InductionScores(
        provenance=Provenance.of(hm, settings=settings, data=(repeated, fresh), seed=seed),
        induction=induction.mean(n_seqs),
        duplicate=duplicate.mean(n_seqs),
        previous_token=previous.mean(n_seqs),
        null=null.mean(n_seqs),
        offset=offset,
        seq_len=seq_len,
        n_seqs=n_seqs,
    )


class _Score:
    """A running sum, per layer, of the attention between given pairs of places."""

    def __init__(self, b: int, seq_len: int, offset: int | None) -> None:
        if offset is None:
            self.queries = torch.arange(b + 1, b + 2 * seq_len)
            self.keys = self.queries - 1
        else:
            i = torch.arange(seq_len)
            i = i[i + offset >= 0]
            self.queries, self.keys = b + seq_len + i, b + i + offset
        self.total: dict[int, Tensor] = {}

    def add(self, layer: int, pattern: Float[Tensor, "batch n_heads pos src"]) -> None:
        found = pattern[:, :, self.queries, self.keys].double().mean(-1).sum(0).cpu()
        self.total[layer] = self.total.get(layer, torch.zeros_like(found)) + found

    def mean(self, n: int) -> Float[Tensor, "layer n_heads"]:
        return torch.stack([self.total[layer] for layer in sorted(self.total)]).div(n).float()


def _patterns(
    hm: HookManager, ids: Int[Tensor, "batch pos"], write: Sequence[Intervention], batch_size: int
) -> Iterator[tuple[int, Float[Tensor, "batch n_heads pos src"]]]:
    width = ids.shape[1]
    per_layer = 4 * min(batch_size, len(ids)) * hm.n_heads * width * width
    group = max(1, _PATTERN_BYTES // per_layer)
    for rows in ids.split(batch_size):
        for first in range(0, hm.n_layers, group):
            layers = range(first, min(first + group, hm.n_layers))
            out = hm.run(rows, read=[f"{layer}.pattern" for layer in layers], write=list(write))
            for layer in layers:
                yield layer, out["pattern", layer]


def _bos_ids(hm: HookManager, bos: bool | None) -> list[int]:
    known = getattr(hm.tokenizer, "bos_token_id", None)
    if bos is None:
        bos = known is not None and list(hm.tokenizer("").input_ids)[:1] == [known]
    if bos and known is None:
        raise DataError("bos=True, but there is no tokenizer with a BOS token; leave bos out")
    return [known] if bos and known is not None else []


def _sequences(
    hm: HookManager, seq_len: int, n_seqs: int, seed: int, start: list[int]
) -> tuple[Int[Tensor, "n_seqs pos"], Int[Tensor, "n_seqs pos"]]:
    size = hm.d_vocab if hm.tokenizer is None else min(hm.d_vocab, len(hm.tokenizer))
    known = torch.arange(size)
    declared = [getattr(hm.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    special = hm.special_mask(known) | torch.isin(
        known, torch.tensor([i for i in declared if isinstance(i, int)], dtype=torch.long)
    )
    ordinary = known[~special]
    if len(ordinary) < 2 * seq_len:
        raise DataError(
            f"{len(ordinary)} tokens are not special, and {2 * seq_len} distinct ones are needed for the null control; "
            f"take seq_len ≤ {len(ordinary) // 2}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack(
        [ordinary[torch.randperm(len(ordinary), generator=generator)[: 2 * seq_len]] for _ in range(n_seqs)]
    )
    front = torch.tensor(start, dtype=torch.long).expand(n_seqs, len(start))
    copy = drawn[:, :seq_len]
    return torch.cat([front, copy, copy], 1), torch.cat([front, drawn], 1)
