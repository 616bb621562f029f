"""The sums that figures of dictionaries are ratios of: by row of text, with what several dictionaries share made once.

A sum is what it would be for one dictionary alone, to the bit: nothing is added in another order or in other parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.intervention import Intervention, Replace, Splice
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where
from interp.data.tokens import TokenBlock
from interp.dictionaries.base import Dictionary
from interp.evaluate.reading import encoded_in_parts, rows_at_once, side_by_side

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["Baseline", "LossSums", "MomentSums", "RowSums", "Subject"]


@runtime_checkable
class Baseline(Protocol):
    """A reconstruction to hold a dictionary against, of as many numbers per token, such as `PCA`."""

    @property
    def rank(self) -> int:
        """Numbers per token."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the numbers of some activations."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return the activations that they stand for."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A dictionary at the sites where it is measured.

    Attributes:
        dictionary: on the model's device.
        reads: the site that it reads.
        gives: the site that it reconstructs; of an SAE, the same.
        pca: a baseline of an SAE, measured on the same tokens.
    """

    dictionary: Dictionary
    reads: Site
    gives: Site
    pca: Baseline | None = None

    @property
    def frame(self) -> tuple[Site, int]:
        """What it shares with all that reconstruct the same site and measure errors in the same space."""
        fixed = self.dictionary.target_space.fixed_names
        return self.gives, id(self.dictionary) if fixed else 0


class RowSums:
    """Sums of every row of text, in fp64 on the host."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Append the sums over the positions of one block that the mask counts.

        Args:
            name: of the sum.
            values: what is summed [row pos].
            mask: what counts of it [row pos].
        """
        self._parts.setdefault(name, []).append(values.double().masked_fill(~mask, 0).sum(-1).cpu())

    def joined(self) -> dict[str, Float[Tensor, "row"]]:
        """Name → the sums of all rows."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


class MomentSums:
    """What needs no logits: sums over tokens in fp64, on the model's device, and over rows.

    Args:
        subjects: the dictionaries.
        rows: most rows per block.
        width: positions per row.
    """

    def __init__(self, subjects: Sequence[Subject], *, rows: int, width: int) -> None:
        self.subjects, self.n = subjects, 0
        # Products of other parts have other bits, and how large parts are depends on the dictionary.
        self._step = [min(rows, rows_at_once(s.dictionary, width)) for s in subjects]
        device = subjects[0].dictionary.W_enc.device
        self.sites = list(dict.fromkeys(site for s in subjects for site in (s.reads, s.gives)))
        self._own = [RowSums() for _ in subjects]
        self._pca: dict[tuple[Any, ...], RowSums] = {}
        # One dictionary of each frame says what is seen of its site.
        self.frames = {s.frame: s for s in reversed(subjects)}
        zeros = {
            key: torch.zeros(s.dictionary.d_out, dtype=torch.float64, device=device) for key, s in self.frames.items()
        }
        self._sum, self._seen = zeros, {key: zero.clone() for key, zero in zeros.items()}
        self.firing = [torch.zeros(s.dictionary.cfg.d_sae, dtype=torch.long, device=device) for s in subjects]

    @torch.no_grad()
    def add(self, run: Run, block: TokenBlock, keep: Bool[Tensor, "row pos"]) -> None:
        """Take in one block.

        Args:
            run: the model on it, with `sites` read.
            block: its tokens.
            keep: which of them count.
        """
        self.n += int(keep.sum())
        values = {site: side_by_side(run[site.name], site) for site in self.sites}
        seen = {}
        for key, subject in self.frames.items():
            x = values[subject.gives].double()
            seen[key] = subject.dictionary.target_seen(x)
            for total, part in ((self._sum[key], x), (self._seen[key], seen[key])):
                total += part.masked_fill(~keep.to(x.device)[..., None], 0).sum((0, 1))
        done: set[tuple[Any, ...]] = set()
        for number, subject in enumerate(self.subjects):
            x = values[subject.reads]
            self._add_one(number, x, seen[subject.frame], block.mask.to(x.device), keep.to(x.device))
            if subject.pca is not None and (key := self._key(number)) not in done:
                done.add(key)
                self._add_pca(self._pca.setdefault(key, RowSums()), subject, x, keep.to(x.device), key[-1])

    def mean(self, frame: tuple[Site, int], *, seen: bool = False) -> Float[Tensor, "d_out"]:
        """The mean of a site that is reconstructed, as the model has it, or as errors are measured in it.

        Args:
            frame: of a subject.
            seen: whether the latter.
        """
        return (self._seen if seen else self._sum)[frame] / self.n

    def rows(self, number: int) -> dict[str, Float[Tensor, "row"]]:
        """The sums of one dictionary, by its number."""
        beside = {} if self.subjects[number].pca is None else self._pca[self._key(number)].joined()
        return {**self._own[number].joined(), **beside}

    def _add_one(self, number: int, x: Tensor, seen: Tensor, real: Tensor, keep: Tensor) -> None:
        dictionary, rows = self.subjects[number].dictionary, self._own[number]
        for part, latents in encoded_in_parts(dictionary, x):
            mine, counted, active = seen[part], keep[part], latents > 0
            self.firing[number] += (active & counted[..., None]).sum((0, 1))
            one = torch.ones_like(counted, dtype=torch.float64)
            rows.add("tokens", one, counted)
            rows.add("tokens_all", one, real[part])
            rows.add("active", active.sum(-1), counted)
            rows.add("active_all", active.sum(-1), real[part])
            made = dictionary.reconstructed_seen(latents, x[part]).double()
            rows.add("missed", (mine - made).pow(2).sum(-1), counted)

    def _add_pca(self, rows: RowSums, subject: Subject, x: Tensor, keep: Tensor, step: int) -> None:
        assert subject.pca is not None
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            near = subject.pca.decode(subject.pca.encode(x[part])).double()
            missed = subject.dictionary.target_seen(x[part].double()) - subject.dictionary.target_seen(near)
            rows.add("missed_pca", missed.pow(2).sum(-1), keep[part])

    def _key(self, number: int) -> tuple[Any, ...]:
        subject = self.subjects[number]
        return *subject.frame, id(subject.pca), self._step[number]


class LossSums:
    """The model's loss under each replacement, and the variance about the mean, summed by row.

    The model's own loss is taken once for all dictionaries; ablations once for each site that is reconstructed, and a
    baseline's loss once for each baseline.

    Args:
        hm: the manager of the model.
        moments: of the same text and dictionaries.
    """

    def __init__(self, hm: "HookManager", moments: MomentSums) -> None:
        self.hm, self.subjects, self._frames = hm, moments.subjects, moments.frames
        self._all, self._own = RowSums(), [RowSums() for _ in self.subjects]
        self._site = {key: RowSums() for key in self._frames}
        self._pca = {self._key(s): RowSums() for s in self.subjects if s.pca is not None}
        self._mean_seen = {key: moments.mean(key, seen=True) for key in self._frames}
        self._mean, self._zero = {}, {}
        for key, subject in self._frames.items():
            features, mean = hm.atlas.shape(subject.gives)[2:], moments.mean(key)
            zero = subject.dictionary.target_space.unfixed(torch.zeros_like(mean))
            self._mean[key], self._zero[key] = (x.view(*features).to(hm.dtype) for x in (mean, zero))

    def add(self, block: TokenBlock, keep: Bool[Tensor, "row pos"]) -> None:
        """Take in one block.

        Args:
            block: its tokens.
            keep: which of them count.
        """
        where, part = Where(mask=keep), _Predictions(self.hm, block, keep)
        sites = list(dict.fromkeys(site for s in self.subjects for site in (s.reads, s.gives)))
        clean = self.hm.run(block.inputs, read=list(sites), logits="all")
        part.known = _logprobs(clean.logits)
        part.count(self._all)
        part.losses(self._all, "clean", part.known)
        for key, rows in self._site.items():
            of, zero = self._frames[key], self._zero[key]
            seen = of.dictionary.target_seen(side_by_side(clean[of.gives.name], of.gives).double())
            rows.add("variance", (seen - self._mean_seen[key]).pow(2).sum(-1), keep.to(seen.device))
            part.write(rows, "zero", Replace(of.gives, zero, where=where), divergence="kl_zero")
            part.write(rows, "mean", Replace(of.gives, self._mean[key], where=where), divergence="kl_mean")
            part.write(rows, "everywhere", Replace(of.gives, zero))
        done: set[tuple[Any, ...]] = set()
        for subject, rows in zip(self.subjects, self._own, strict=True):
            stands_in: Intervention = Splice(subject.gives, subject.dictionary, where=where)
            if subject.reads != subject.gives:
                x, made = clean[subject.gives.name], torch.no_grad()(subject.dictionary)(clean[subject.reads.name])
                stands_in = Replace(subject.gives, made.to(x.dtype).view_as(x), where=where)
            part.write(rows, "sae", stands_in, divergence="kl")
            if subject.pca is not None and (pair := self._key(subject)) not in done:
                done.add(pair)
                part.write(self._pca[pair], "pca", Splice(subject.gives, subject.pca, where=where))

    def rows(self, number: int) -> dict[str, Float[Tensor, "row"]]:
        """The sums of one dictionary, by its number."""
        subject = self.subjects[number]
        found = {**self._all.joined(), **self._site[subject.frame].joined(), **self._own[number].joined()}
        return found if subject.pca is None else {**found, **self._pca[self._key(subject)].joined()}

    @staticmethod
    def _key(subject: Subject) -> tuple[Any, ...]:
        return subject.gives, id(subject.pca)


class _Predictions:
    """The predictions of one block that count, and the model's own log-probabilities of them."""

    known: Float[Tensor, "row next d_vocab"]

    def __init__(self, hm: "HookManager", block: TokenBlock, keep: Bool[Tensor, "row pos"]) -> None:
        self.hm, self.block = hm, block
        self.ours = (keep[:, :-1] & keep[:, 1:]).to(hm.device)
        self.score = (keep[:, :-1] & block.mask[:, 1:]).to(hm.device)
        self.targets = block.ids[:, 1:].to(hm.device)

    def count(self, rows: RowSums) -> None:
        one = torch.ones_like(self.ours, dtype=torch.float64)
        rows.add("n", one, self.ours)
        rows.add("n_score", one, self.score)

    def losses(self, rows: RowSums, name: str, logprobs: Tensor) -> None:
        loss = -logprobs.gather(-1, self.targets[..., None])[..., 0]
        rows.add(name, loss, self.ours)
        rows.add(f"score_{name}", loss, self.score)

    def write(self, rows: RowSums, name: str, edit: Intervention, *, divergence: str = "") -> None:
        logprobs = _logprobs(self.hm.run(self.block.inputs, write=[edit], logits="all").logits)
        self.losses(rows, name, logprobs)
        if divergence:
            rows.add(divergence, (self.known.exp() * (self.known - logprobs)).sum(-1), self.ours)


def _logprobs(logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row next d_vocab"]:
    return logits[:, :-1].float().log_softmax(-1)
