"""The causal inner product: a geometry of the unembedding in which concepts that vary freely are orthogonal.

    geometry = causal_geometry(hm)
    gender = geometry.concept([(" king", " queen"), (" he", " she")], name="male - female")
    hm.run(text, write=geometry.steer(gender).as_interventions(0.3))

A softmax model gives P(token | text) ∝ exp(λ(text) · γ(token)), with λ the output of the final norm and γ a column of
the unembedding times the logit scale. γ → γ A, λ → A⁻¹ λ is the same model, so that cosines of γ mean nothing by
themselves. ⟨a, b⟩ = aᵀ Cov(γ)⁻¹ b does not depend on A.

Source: Park, Choe and Veitch (2023), "The Linear Representation Hypothesis and the Geometry of Large Language Models",
arXiv 2311.03658, §3 and §4. Departures: rows of the unembedding that no token uses are left out of Cov(γ), its smallest
eigenvalues have a floor, everything is in double precision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError, ModelError
from interp.core.fit import auroc
from interp.core.manager import HookManager
from interp.core.readout import Readout
from interp.core.result import Provenance, Result

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["CausalConcept", "CausalConcepts", "CausalGeometry", "causal_concepts", "causal_geometry"]

SITE = "ln_final.hook_out"
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class CausalConcept:
    """A concept's direction in the unembedding.

    Attributes:
        name: what it is called.
        pairs: ids of the words of each pair, without the concept and with it.
        mean: mean difference of the pairs' γ, in double precision, in units of the unembedding.
        vector: the same with causal norm 1: γ̄.
        loo: for each pair, its difference's projection on the direction of all others.
        random: projections of differences of random pairs of tokens on γ̄.
        skipped: pairs whose words are not single tokens.
    """

    name: str
    pairs: Int[Tensor, "pair 2"]
    mean: Float[Tensor, " d_model"]
    vector: Float[Tensor, " d_model"]
    loo: Float[Tensor, " pair"]
    random: Float[Tensor, " drawn"]
    skipped: tuple[str, ...] = ()

    @property
    def auroc(self) -> float:
        """Probability that a left-out pair projects further than a random one; one half where there is no concept."""
        truth = torch.tensor([True] * len(self.loo) + [False] * len(self.random))
        return float(auroc(torch.cat([self.loo, self.random]), truth))


@dataclass(frozen=True, eq=False)
class CausalGeometry:
    """Cov(γ) of a model, and what follows from it. Make one with `causal_geometry`.

    Attributes:
        hm: the model.
        covariance: of γ over the tokens that count, in double precision.
        values: its eigenvalues, from the smallest, before the floor.
        vectors: its eigenvectors, as columns.
        floor: eigenvalues below this are taken for it.
        raised: how many are.
        kept: True for tokens that count.
        dropped: why tokens were left out → how many.
    """

    hm: HookManager
    covariance: Float[Tensor, "d_model d_model"]
    values: Float[Tensor, " d_model"]
    vectors: Float[Tensor, "d_model d_model"]
    floor: float
    raised: int
    kept: Bool[Tensor, " d_vocab"]
    dropped: Mapping[str, int]

    def power(self, exponent: float) -> Float[Tensor, "d_model d_model"]:
        """Return Cov(γ) to a power, its eigenvalues floored."""
        return (self.vectors * self.values.clamp(min=self.floor) ** exponent) @ self.vectors.T

    def whiten(self, vectors: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Return vectors of the unembedding as g = Cov^(−1/2) γ, where causal and Euclidean products agree."""
        return vectors.double() @ self.power(-0.5)

    def whiten_states(self, states: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Return final states as l = Cov^(1/2) λ, so that l · g = λ · γ."""
        return states.double() @ self.power(0.5)

    def inner(self, a: Float[Tensor, "*#n d_model"], b: Float[Tensor, "*#n d_model"]) -> Float[Tensor, "..."]:
        """Return the causal inner product aᵀ Cov⁻¹ b of vectors of the unembedding."""
        return (self.whiten(a) * self.whiten(b)).sum(-1)

    def unembedding(self, tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n d_model"]:
        """Return γ of tokens, the logit scale multiplied in, in double precision."""
        rows = self.hm.weights.W_U.T.index_select(0, tokens.reshape(-1).to(self.hm.weights.W_U.device))
        return (rows.double().cpu() * Readout.of(self.hm).scale).reshape(*tokens.shape, -1)

    def concept(
        self,
        pairs: Sequence[tuple[str | int, str | int]],
        *,
        name: str = "concept",
        prefix: str = "",
        n_random: int = 10_000,
        seed: int = 0,
    ) -> CausalConcept:
        """Return a concept's direction from pairs of single tokens that differ in it.

        Args:
            pairs: (without the concept, with it): texts of one token each, or ids. Others are skipped and named.
            name: what it is called.
            prefix: put before each text, such as " ".
            n_random: pairs of different tokens, drawn at random, to compare with.
            seed: of the draw.

        Raises:
            ConfigError: no random pairs.
            DataError: fewer than two usable pairs, or pairs whose differences cancel.
        """
        if type(n_random) is not int or n_random < 1:
            raise ConfigError(f"n_random={n_random!r}: expected a whole number ≥ 1 of random pairs to compare with")
        wrong = next((pair for pair in pairs if isinstance(pair, str) or len(pair) != 2), None)
        if wrong is not None:
            raise DataError(f"{name!r} has {wrong!r} among its pairs; expected two words, or two ids, each")
        found, skipped = self._ids(pairs, prefix)
        if len(found) < 2:
            shown = f"; not single tokens: {', '.join(skipped[:6])}" if skipped else ""
            raise DataError(f"{name!r} has {len(found)} usable pairs and needs two at least{shown}")
        ids = torch.tensor(found)
        gamma = self.unembedding(ids)
        white = self.whiten(gamma[:, 1] - gamma[:, 0])
        total = white.sum(0)
        if not float(total.norm()) > 1e-9 * float(white.norm(dim=1).max()):
            raise DataError(f"the differences of {name!r} cancel, so they have no common direction")
        others = total - white
        loo = (white * others).sum(1) / others.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        unit = total / total.norm()
        mean = (gamma[:, 1] - gamma[:, 0]).mean(0)
        return CausalConcept(
            name=name,
            pairs=ids,
            mean=mean,
            vector=mean / float(self.inner(mean, mean).sqrt()),
            loo=loo,
            random=self._random(n_random, seed) @ unit,
            skipped=tuple(skipped),
        )

    def _ids(self, pairs: Sequence[tuple[str | int, str | int]], prefix: str) -> tuple[list[list[int]], list[str]]:
        found: dict[tuple[int, int], None] = {}
        skipped = []
        for a, b in pairs:
            try:
                one, other = (w if isinstance(w, int) else self.hm.to_single_token(prefix + w) for w in (a, b))
            except DataError:
                skipped.append(f"{a} - {b}")
                continue
            if one == other or not (min(one, other) >= 0 and max(one, other) < len(self.kept)):
                raise DataError(
                    f"the pair ({a!r}, {b!r}) is token {one} and token {other}; expected two of the vocabulary"
                )
            found[one, other] = None
        return [list(pair) for pair in found], skipped

    def _random(self, n: int, seed: int) -> Float[Tensor, "drawn d_model"]:
        """Whitened differences of random pairs of the tokens that count."""
        draw = torch.Generator().manual_seed(seed)
        known = self.kept.nonzero()[:, 0]
        first = torch.randint(len(known), (n,), generator=draw)
        second = (first + torch.randint(1, len(known), (n,), generator=draw)) % len(known)
        return self.whiten(self.unembedding(known[second]) - self.unembedding(known[first]))

    def steer(self, concept: CausalConcept) -> Direction:
        """Return the edit l → l + α ḡ of whitened states as a direction, whose raw dose is α.

        With |ḡ| = 1, l + α ḡ = Cov^(1/2) (λ + α Cov^(−1/2) ḡ) = Cov^(1/2) (λ + α Cov⁻¹ γ̄): the vector is Cov⁻¹ γ̄, at
        the output of the final norm, where λ stands. A dose of α adds α ⟨γ̄, γ(t)⟩ to the logit of every token t, so
        tokens that differ in a concept orthogonal to γ̄ keep their odds. That holds there alone: before the norm a step
        is divided by a σ that it changes, and before earlier blocks it is read by them.

        Args:
            concept: the concept; its vector has causal norm 1, not the length of the mean difference.
        """
        notes = ["logits are meant before their soft-cap"] if Readout.of(self.hm).cap is not None else []
        if self.hm.map.module(self.hm.root, "ln_final") is None:
            raise ModelError(
                f"{self.hm.map.family} has no final norm, so no {SITE}; add the vector at its last resid_post"
            )
        return Direction(
            vectors={SITE: (self.power(-1.0) @ concept.vector).float()},
            method="causal inner product",
            model=Provenance.of(self.hm, settings={"pairs": concept.pairs.tolist(), "floor": self.floor}),
            name=concept.name,
            folded=self.hm.is_folded,
            notes=("a dose of 1 adds the causal inner product with γ̄ to each logit; valid here alone", *notes),
        )


def causal_geometry(hm: HookManager, *, floor: float = 1e-6, drop: Sequence[int] = ()) -> CausalGeometry:
    """Return the causal geometry of a model's unembedding.

    Left out of Cov(γ): ids that the tokenizer lacks, rows of zeros, rows that are equal to another row bit by bit (as
    padded vocabularies have them), and `drop`. Rows that were never trained but drawn at random cannot be told; give
    their ids. Memory: 8192 · d_model + 4 · d_model² doubles.

    Args:
        hm: the model.
        floor: eigenvalues of Cov(γ) below this share of the largest are raised to it, as their inverse would be noise.
            Where none is, the geometry is the same for every reparametrisation of the model.
        drop: further ids to leave out.

    Raises:
        ConfigError: a floor outside (0, 1).
        DataError: fewer than two tokens are left, or all are equal.
        ModelError: the unembedding is not linear.
    """
    if not 0 < floor < 1:
        raise ConfigError(f"floor={floor!r}: expected a share of the largest eigenvalue, between 0 and 1")
    readout = Readout.of(hm)
    W = readout.unembed.weight.detach()
    kept, dropped = _counted(hm, W, drop)
    n = int(kept.sum())
    if n < 2:
        raise DataError(f"{n} tokens are left of {len(kept)}: {dropped}; Cov(γ) needs two at least")
    total = torch.zeros(W.shape[1], dtype=torch.float64)
    for rows, used in zip(W.split(_CHUNK), kept.split(_CHUNK), strict=True):
        total += rows.double().cpu()[used].sum(0)
    covariance = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64)
    for rows, used in zip(W.split(_CHUNK), kept.split(_CHUNK), strict=True):
        centred = rows.double().cpu()[used] - total / n
        covariance += centred.T @ centred
    covariance *= readout.scale**2 / n
    values, vectors = torch.linalg.eigh(covariance)
    if not float(values[-1]) > 0:
        raise DataError("all tokens have one unembedding row, so there is no geometry")
    least = floor * float(values[-1])
    return CausalGeometry(hm, covariance, values, vectors, least, int((values < least).sum()), kept, dropped)


def _counted(hm: HookManager, W: Tensor, drop: Sequence[int]) -> tuple[Tensor, dict[str, int]]:
    """Which rows of the unembedding count, and why others do not."""
    size = len(W)
    wrong = next((i for i in drop if not 0 <= i < size), None)
    if wrong is not None:
        raise DataError(f"drop: token {wrong} is outside the vocabulary 0 … {size - 1}")
    known = size if hm.tokenizer is None else min(size, len(hm.tokenizer))
    reasons = {"not in the tokenizer": torch.arange(size) >= known}
    reasons["zero"] = ~torch.cat([rows.any(1).cpu() for rows in W.split(_CHUNK)])
    reasons["equal to another"] = _repeated(W)
    reasons["dropped"] = torch.zeros(size, dtype=torch.bool)
    reasons["dropped"][torch.tensor(list(drop), dtype=torch.long)] = True
    kept = torch.ones(size, dtype=torch.bool)
    counts = {}
    for why, rows in reasons.items():
        if bool((rows & kept).any()):
            counts[why] = int((rows & kept).sum())
        kept &= ~rows
    return kept, counts


def _repeated(W: Tensor) -> Bool[Tensor, " row"]:
    """Rows that another row equals; found by a random projection, then compared in full."""
    draw = torch.Generator().manual_seed(0)
    key = torch.randn(W.shape[1], generator=draw, dtype=torch.float64)
    keys = torch.cat([(rows.double().cpu() * key).sum(1) for rows in W.split(_CHUNK)])
    _, group, counts = keys.unique(return_inverse=True, return_counts=True)
    found = torch.zeros(len(W), dtype=torch.bool)
    for number in (counts > 1).nonzero()[:, 0].tolist():
        rows = (group == number).nonzero()[:, 0]
        same = W[rows.to(W.device)]
        found[rows] = (same == same[:1]).all(1).cpu()
    return found


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CausalConcepts(Result):
    """Concepts of one model beside each other, in the causal and in the Euclidean geometry.

    Attributes:
        names: of the concepts.
        causal: cosines of their directions under the causal inner product.
        euclidean: the same under the ordinary one.
        loo: projection of each left-out pair on the direction of its concept's others, by concept.
        random: projections of random pairs.
        auroc: how well left-out pairs are told from random ones, by concept.
        n_pairs: pairs used of each.
        skipped: pairs that are not single tokens, by concept.
        raised: eigenvalues of Cov(γ) that are below the floor.
        dropped: rows of the unembedding left out, by reason.
    """

    title: ClassVar[str] = "Concepts under the causal inner product"
    names: list[str]
    causal: Float[Tensor, "concept concept"]
    euclidean: Float[Tensor, "concept concept"]
    loo: dict[str, Tensor]
    random: dict[str, Tensor]
    auroc: dict[str, float]
    n_pairs: dict[str, int]
    skipped: dict[str, tuple[str, ...]]
    raised: int
    dropped: dict[str, int]

    def off_diagonal(self, which: str = "causal") -> float:
        """Return the mean absolute cosine of different concepts; NaN for one concept."""
        values = {"causal": self.causal, "euclidean": self.euclidean}
        if which not in values:
            raise ConfigError(f"which={which!r}: expected causal or euclidean")
        other = ~torch.eye(len(self.names), dtype=torch.bool)
        return float(values[which][other].abs().mean()) if len(self.names) > 1 else math.nan

    def to_frame(self) -> "pandas.DataFrame":
        """One row per concept: its pairs, the mean projections of left-out and of random pairs, and the AUROC."""
        import pandas

        rows = [
            {
                "concept": name,
                "pairs": self.n_pairs[name],
                "skipped": len(self.skipped[name]),
                "loo": float(self.loo[name].mean()),
                "random": float(self.random[name].mean()),
                "random_sd": float(self.random[name].std()),
                "auroc": self.auroc[name],
            }
            for name in self.names
        ]
        return pandas.DataFrame(rows)

    def plot(self, which: str = "causal") -> "plotly.graph_objects.Figure":
        """Draw the cosines of concepts.

        Args:
            which: "causal" or "euclidean".
        """
        from interp.report.figures import Axis, heatmap

        values = self.causal if which == "causal" else self.euclidean
        axis = Axis("concept", self.names)
        return heatmap(values, rows=axis, columns=axis, title=self.title, value=f"{which} cosine", diverging=True)

    def summary(self) -> str:
        """Say how far the concepts are apart and which of them are there at all."""
        weak = [name for name in self.names if self.auroc[name] < 0.9]
        told = f"left-out pairs are told from random ones (AUROC ≥ 0.9) for {len(self.names) - len(weak)}"
        return (
            f"{len(self.names)} concepts: mean |cosine| of different ones {self.off_diagonal():.3f} causal, "
            f"{self.off_diagonal('euclidean'):.3f} Euclidean; {told}"
            + (f", not for {', '.join(weak)}" if weak else "")
            + (f"; {self.raised} eigenvalues below the floor" if self.raised else "")
        )


def causal_concepts(
    hm: HookManager,
    concepts: Mapping[str, Sequence[tuple[str | int, str | int]]],
    *,
    prefix: str = "",
    floor: float = 1e-6,
    n_random: int = 10_000,
    seed: int = 0,
) -> CausalConcepts:
    """Measure concepts given as word pairs in the causal and in the Euclidean geometry of a model.

    Args:
        hm: the model.
        concepts: name → pairs of single tokens, such as `load_word_pairs` reads.
        prefix: put before each word, such as " ".
        floor: as for `causal_geometry`.
        n_random: random pairs to compare with.
        seed: of their draw.

    Raises:
        DataError: no concepts, or one with fewer than two usable pairs.
    """
    if not concepts:
        raise DataError("no concepts were given; give names with pairs of words")
    geometry = causal_geometry(hm, floor=floor)
    found = [
        geometry.concept(pairs, name=name, prefix=prefix, n_random=n_random, seed=seed)
        for name, pairs in concepts.items()
    ]
    means = torch.stack([c.mean for c in found])
    white = geometry.whiten(means)
    cosines = []
    for rows in (white, means):
        unit = rows / rows.norm(dim=1, keepdim=True)
        cosines.append(unit @ unit.T)
    ids = torch.cat([c.pairs for c in found])
    return CausalConcepts(
        provenance=Provenance.of(hm, settings={"floor": floor, "n_random": n_random}, data=(ids,), seed=seed),
        names=list(concepts),
        causal=cosines[0],
        euclidean=cosines[1],
        loo={c.name: c.loo for c in found},
        random={c.name: c.random for c in found},
        auroc={c.name: c.auroc for c in found},
        n_pairs={c.name: len(c.pairs) for c in found},
        skipped={c.name: c.skipped for c in found},
        raised=geometry.raised,
        dropped=dict(geometry.dropped),
    )
