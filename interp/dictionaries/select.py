"""Which pre-activations are latents: one dense product, some tokens at a time, of which only the chosen entries stay.

The product is made once, without a graph, `rows` tokens at a time: rows = max(1, C // (d_sae · size(dtype))) with C =
32 MiB on a CPU and 256 MiB on a GPU. So memory grows with `rows · d_sae` (three times that with a score and dead
latents) plus a few numbers per entry, not with token × d_sae.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, ShapeError
from interp.dictionaries.across import ALONE, Across
from interp.dictionaries.kernels import Codes, Entries, encode_entries

__all__ = ["Encoder", "encode_batch_topk", "encode_columns", "encode_topk", "pre_activations"]

# Bytes of pre-activations that exist at a time. On a CPU they should stay in its cache between the product and the
# selection; on a GPU a chunk must be large enough to keep it busy.
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
_NO_ENTRY = -torch.inf

Score = Callable[[Float[Tensor, "token d_sae"], slice], Float[Tensor, "token d_sae"]]
"""What entries are chosen by, of the pre-activations of some tokens and which tokens these are; never the values."""


@dataclass(frozen=True)
class Encoder:
    """What makes pre-activations (x − centre) W_enc + b_enc, and which latents count as dead.

    Args:
        W_enc: encoder directions, one per column.
        b_enc: encoder biases.
        centre: subtracted from each token first; None for 0.
        score: what entries are chosen by; None for the pre-activations themselves. No gradient passes it.
        dead: latents among which a second choice is made; None for no such choice.
        k_dead: latents per token of the second choice.
        across: the processes among whose tokens and latents the choices are made.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    centre: Float[Tensor, "d_in"] | None = None
    score: Score | None = None
    dead: Bool[Tensor, "d_sae"] | None = None
    k_dead: int = 0
    across: Across = ALONE

    @property
    def d_sae(self) -> int:
        """Number of latents that are here."""
        return self.W_enc.shape[1]

    @property
    def latents(self) -> int:
        """Number of latents of all processes."""
        return self.d_sae * self.across.latents.size

    def check(self, x: Tensor) -> None:
        """Refuse what cannot be encoded.

        Raises:
            ShapeError: activations of another width.
            ConfigError: a k_dead outside 1 … d_sae.
        """
        d_in, d_sae = len(self.W_enc), self.latents
        if x.ndim != 2 or x.shape[1] != d_in:
            raise ShapeError(
                f"activations of shape {tuple(x.shape)} for an encoder of d_in {d_in}; give [token {d_in}]"
            )
        if self.dead is not None and not 0 < self.k_dead <= d_sae:
            raise ConfigError(f"k_dead is {self.k_dead} for {d_sae} latents; it must be from 1 to {d_sae}")

    def chunks(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the pre-activations of some tokens after the other, and their scores; the next ones replace them."""
        centred = x.detach() if self.centre is None else x.detach() - self.centre.detach()
        W_enc, b_enc = self.W_enc.detach(), self.b_enc.detach()
        rows = max(1, _CHUNK_BYTES.get(x.device.type, 2**28) // (self.d_sae * x.element_size()))
        chunk = x.new_empty(min(rows, len(x)), self.d_sae)
        for low in range(0, len(x), rows):
            part = centred[low : low + rows]
            pre = torch.addmm(b_enc, part, W_enc, out=chunk[: len(part)])
            where = slice(low, low + len(part))
            yield where, pre, pre if self.score is None else self.score(pre, where)

    def codes(self, x: Tensor, values: Tensor, entries: Entries) -> Codes:
        """Entries with their gradients."""
        return encode_entries(x, self.W_enc, self.b_enc, self.centre, values, entries)


class _Chosen:
    """As many entries in each token, collected chunk by chunk."""

    def __init__(self, across: Across) -> None:
        self.across = across
        self.values: list[Tensor] = []
        self.index: list[Tensor] = []

    def add(self, pre: Tensor, score: Tensor, k: int) -> None:
        """The k entries of each token with the largest score; those of score −∞ are marked as none.

        Of latents in several shards, so many entries are marked as none as others have better ones: then no size
        depends on the data, and a GPU need not wait.
        """
        best, index = score.topk(min(k, score.shape[1]), dim=-1, sorted=False)
        if self.across.latents.size > 1:
            best = best.masked_fill(~self.across.best(best, k), _NO_ENTRY)
        self.values.append(pre.gather(-1, index).masked_fill(best.isneginf(), _NO_ENTRY))
        self.index.append(index)

    def codes(self, x: Tensor, encoder: Encoder) -> Codes:
        return encoder.codes(x, torch.cat(self.values), Entries(torch.cat(self.index), encoder.d_sae))


class _Revived(_Chosen):
    """The second choice, among dead latents."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.across)
        self.encoder = encoder

    def look(self, pre: Tensor, score: Tensor) -> None:
        if self.encoder.dead is not None:
            self.add(pre, score.masked_fill(~self.encoder.dead, _NO_ENTRY), self.encoder.k_dead)

    def found(self, x: Tensor) -> Codes | None:
        return self.codes(x, self.encoder) if self.values else None


def encode_topk(x: Float[Tensor, "token d_in"], encoder: Encoder, *, k: int) -> tuple[Codes, Codes | None]:
    """Return each token's k entries with the largest score, and its largest among dead latents.

    No size depends on what the data hold, so a GPU need not wait for the host.

    Args:
        x: activations.
        encoder: what makes pre-activations of them.
        k: latents per token.

    Returns:
        The codes, and those among dead latents or None.

    Raises:
        ShapeError: activations of another width.
        ConfigError: a k outside 1 … d_sae.

    Source: Gao et al. 2024 (2406.04093), §2.3, and appendix A.2 for dead latents.
    """
    encoder.check(x)
    if not 0 < k <= encoder.latents:
        raise ConfigError(f"k is {k} for {encoder.latents} latents; it must be from 1 to {encoder.latents}")
    chosen, revived = _Chosen(encoder.across), _Revived(encoder)
    with torch.no_grad():
        for _, pre, score in encoder.chunks(x):
            chosen.add(pre, score, k)
            revived.look(pre, score)
    if not len(x):
        chosen.values.append(x.new_empty(0, k))
        chosen.index.append(torch.empty(0, k, dtype=torch.long, device=x.device))
    return chosen.codes(x, encoder), revived.found(x)


def encode_batch_topk(
    x: Float[Tensor, "token d_in"], encoder: Encoder, *, n: int, floor: float | None = None
) -> tuple[Codes, Codes | None, Float[Tensor, ""]]:
    """Return the n entries with the largest score in the whole batch, each token's largest among dead latents, and the
    smallest score that was chosen.

    On a CPU entries at or below `floor` are passed over at first; where too few are left, all are looked at, so that
    the choice is the same whatever the floor. On a GPU the n largest of each chunk go on to the last choice, of which
    no size depends on the data.

    Args:
        x: activations.
        encoder: what makes pre-activations of them.
        n: entries in all.
        floor: a score that few more than n entries are above, such as a bit less than the last batch's smallest.

    Raises:
        ShapeError: activations of another width.
        ConfigError: more entries than there are.

    Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders" (2412.06410), §3.
    """
    encoder.check(x)
    across, most = encoder.across, encoder.across.every.count(len(x) * encoder.d_sae)
    if not 0 <= n <= most:
        tokens = most // encoder.latents
        raise ConfigError(f"{n} entries are to be chosen among {tokens} tokens × {encoder.latents} latents; lower k")
    filtered = floor is not None and x.device.type == "cpu"
    revived = _Revived(encoder)
    with torch.no_grad():
        picked = _candidates(x, encoder, n, floor if filtered else None, revived)
        if filtered and across.every.count(len(picked.score)) < n:
            revived = _Revived(encoder)
            picked = _candidates(x, encoder, n, None, revived)
        kept, least = picked.best_of_all(n, across)
    entries = Entries(kept.latent, encoder.d_sae, tokens=kept.token, n_tokens=len(x))
    return encoder.codes(x, kept.value, entries), revived.found(x), least


def encode_columns(
    x: Float[Tensor, "token d_in"], encoder: Encoder, *, per_latent: Int[Tensor, "d_sae"]
) -> tuple[Codes, Codes | None]:
    """Return for each latent the entries with its largest scores in the batch, as many as it may have.

    Memory: all pre-activations of the batch, since each latent chooses among all tokens.

    Args:
        x: activations.
        encoder: what makes pre-activations of them.
        per_latent: how many tokens each latent takes; more than there are means all.

    Raises:
        ShapeError: activations of another width.

    Source: Ayonrinde 2024, "Adaptive sparse allocation with mutual choice and feature choice" (2411.02124), Feature
        Choice.
    """
    encoder.check(x)
    revived = _Revived(encoder)
    with torch.no_grad():
        none = x.new_empty(0, encoder.d_sae)
        parts, scores = [none], [none]
        for _, pre, score in encoder.chunks(x):
            revived.look(pre, score)
            parts.append(pre.clone())
            if score is not pre:
                scores.append(score)
        pre = torch.cat(parts)
        score = pre if encoder.score is None else torch.cat(scores)
        rank = score.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        token, latent = (rank < per_latent).nonzero(as_tuple=True)
        values = pre[token, latent]
    entries = Entries(latent, encoder.d_sae, tokens=token, n_tokens=len(x))
    return encoder.codes(x, values, entries), revived.found(x)


@torch.no_grad()
def pre_activations(x: Float[Tensor, "token d_in"], encoder: Encoder) -> Float[Tensor, "token d_sae"]:
    """Return (x − centre) W_enc + b_enc of all latents at once, without a graph.

    Raises:
        ShapeError: activations of another width.
    """
    encoder.check(x)
    centred = x if encoder.centre is None else x - encoder.centre
    return torch.addmm(encoder.b_enc, centred, encoder.W_enc)


@dataclass(frozen=True)
class _Candidates:
    """Entries that may be chosen, in the order of their tokens."""

    score: Tensor
    value: Tensor
    token: Tensor
    latent: Tensor

    def best(self, n: int) -> "_Candidates":
        """The n of largest score, in the same order."""
        return self if len(self.score) == n else self.at(_largest(self.score, n))

    def best_of_all(self, n: int, across: Across) -> tuple["_Candidates", Tensor]:
        """Which of these are among the n of largest score of all processes, and the smallest score of those."""
        if across.alone:
            kept = self.best(n)
            return kept, kept.score.min() if n else kept.score.new_zeros(())
        mine = self.best(min(n, len(self.score)))
        kept = mine.at(across.largest(mine.score, n).nonzero()[:, 0])  # a GPU waits for their number
        least = torch.cat([kept.score, kept.score.new_full((1,), torch.inf)]).min()
        return kept, torch.stack(across.every.gather(least[None])).min() if n else kept.score.new_zeros(())

    def at(self, kept: Tensor) -> "_Candidates":
        """Some of them."""
        return _Candidates(self.score[kept], self.value[kept], self.token[kept], self.latent[kept])


def _candidates(x: Tensor, encoder: Encoder, n: int, floor: float | None, revived: _Revived) -> _Candidates:
    parts = []
    for where, pre, score in encoder.chunks(x):
        revived.look(pre, score)
        if floor is None:
            chosen = _largest(score.flatten(), min(n, score.numel()))
            token, latent = chosen // encoder.d_sae, chosen % encoder.d_sae
        else:
            token, latent = (score > floor).nonzero(as_tuple=True)
        parts.append((score[token, latent], pre[token, latent], token + where.start, latent))
    if not parts:
        none = torch.empty(0, dtype=torch.long, device=x.device)
        return _Candidates(x.new_empty(0), x.new_empty(0), none, none)
    return _Candidates(*(torch.cat(found) for found in zip(*parts, strict=True)))


def _largest(score: Tensor, n: int) -> Tensor:
    """Where the n largest are, in order; on a CPU the first ones of those that are equal, whatever stands between."""
    best, index = score.topk(n, sorted=False)
    if n == 0 or score.device.type != "cpu":
        return index.sort().values
    least = best.min()
    above = index[best > least]
    equal = (score == least).nonzero()[: n - len(above), 0]
    chosen = torch.cat([above, equal])
    # Nothing equals NaN, with which the loss is refused later.
    return (chosen if len(chosen) == n else index).sort().values
