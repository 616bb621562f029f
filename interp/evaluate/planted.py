"""Dictionaries against a known truth: activations made of planted atoms, and scores of what was found of them."""

import importlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ShapeError
from interp.core.result import Provenance, Result
from interp.dictionaries.base import Dictionary
from interp.evaluate.agreement import best_cosines, matched_cosine, mmcs, uniqueness
from interp.evaluate.noise import ratio_interval
from interp.evaluate.reading import encoded_in_parts

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["PlantedScores", "PlantedWorld", "planted_scores"]

_SMALLEST_NORM = 1e-6  # tokens of a smaller norm have no ratio of norms; as SAELens has it
_OF_DECODER, _OF_LATENTS = (
    ("mmcs", "coverage", "mcc", "uniqueness"),
    ("precision", "recall", "f1", "atom_f1", "shrinkage"),
)
_FIGURES = (*_OF_DECODER, *_OF_LATENTS, "norm_ratio", "explained_variance", "dead", "l0", "true_l0")


@dataclass(frozen=True, eq=False)
class PlantedWorld:
    """Activations x = codes · atoms + noise, of atoms that are known.

    Every atom has norm 1. Up to `d` of them are orthonormal; more are random directions. An atom that is on has a
    magnitude drawn evenly from 0.5 to 1.5.

    * "independent": each atom is on with probability `density`.
    * "pairs": so are these, but atoms 2i and 2i + 1 come together: their correlation is `coupling`.
    * "hierarchy": atom 2i is on with probability `density`; its child 2i + 1 only where it is, and then with
      probability `coupling`.

    Attributes:
        n_atoms: atoms.
        d: width of the activations.
        density: probability that an atom (of a hierarchy: a parent) is on.
        structure: how atoms hang together; see above.
        coupling: see above; 0 to 1.
        noise: standard deviation of what is added to each dimension.
        seed: of the atoms; `sample` has its own.
        atoms: [n d], made from the seed.
    """

    n_atoms: int
    d: int
    density: float = 0.05
    structure: Literal["independent", "pairs", "hierarchy"] = "independent"
    coupling: float = 0.5
    noise: float = 0.0
    seed: int = 0
    atoms: Float[Tensor, "n d"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.n_atoms < 1 or self.d < 1 or not 0 < self.density <= 1 or not 0 <= self.coupling <= 1 or self.noise < 0:
            raise ConfigError(f"{self}: expected atoms and dimensions, 0 < density ≤ 1, 0 ≤ coupling ≤ 1, noise ≥ 0")
        if self.structure not in ("independent", "pairs", "hierarchy"):
            raise ConfigError(f"structure={self.structure!r}: expected 'independent', 'pairs' or 'hierarchy'")
        if self.structure != "independent" and self.n_atoms % 2:
            raise ConfigError(f"{self.n_atoms} atoms do not come in pairs; give an even number")
        drawn = torch.randn(self.n_atoms, self.d, generator=torch.Generator().manual_seed(self.seed))
        if self.n_atoms <= self.d:
            drawn = torch.linalg.qr(drawn.T).Q.T.contiguous()
        object.__setattr__(self, "atoms", drawn / drawn.norm(dim=1, keepdim=True))

    def sample(self, n: int, *, seed: int) -> tuple[Float[Tensor, "token d"], Float[Tensor, "token n"]]:
        """Return activations of `n` independent tokens, and the codes that they were made of.

        Args:
            n: tokens.
            seed: of the draw.
        """
        draw = torch.Generator().manual_seed(seed)
        on = torch.rand(n, self.n_atoms, generator=draw) < self.density
        again = torch.rand(n, self.n_atoms, generator=draw) < self.coupling
        if self.structure == "pairs":
            # A copy with probability c, else a draw of its own: correlation c, and the same density.
            on[:, 1::2] = torch.where(again[:, 1::2], on[:, ::2], on[:, 1::2])
        if self.structure == "hierarchy":
            on[:, 1::2] = on[:, ::2] & again[:, 1::2]
        codes = on * (torch.rand(n, self.n_atoms, generator=draw) + 0.5)
        return codes @ self.atoms + self.noise * torch.randn(n, self.d, generator=draw), codes


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PlantedScores(Result):
    """What a dictionary found of planted atoms; a latent fires where it is not 0, an atom is on where its code is > 0.

    A latent's *nearest* atom is that of the largest |cos| with its decoder row. Atoms and latents are *matched* one to
    one by the largest sum of |cos|, min(n, d_sae) pairs. Where a figure equals one of `sae_lens.synthetic` (6.54), the
    name it has there follows in brackets.

    Attributes:
        n_tokens: tokens.
        mmcs: mean over latents of |cos| with the nearest atom.
        coverage: mean over atoms of the largest |cos| with a latent.
        mcc: mean |cos| of the matched pairs [`mcc`].
        uniqueness: distinct nearest atoms, over latents [`uniqueness`].
        precision, recall, f1: mean over all latents of the next three [`classification.precision`, …].
        latent_precision: of each latent, share of the tokens where it fires that have its nearest atom; 0 if it never
            fires.
        latent_recall: share of the tokens with that atom where it fires; 0 if there is none.
        latent_f1: their harmonic mean; 0 where both are.
        atom_f1: mean over the matched atoms of F1 with their latent, so that many latents of one atom count once.
        shrinkage: mean over matched atoms of Σ a ‖W_dec row‖ / Σ code ‖atom‖, over tokens where both are active: 1
            where magnitudes are right. Pairs that never are active together are left out.
        norm_ratio: mean of ‖x̂‖ / ‖x‖ over tokens with ‖x‖ > 1e-6 [`shrinkage`].
        explained_variance: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² [`explained_variance`].
        dead: latents that never fired [`dead_latents`].
        l0: mean number of latents that fire [`sae_l0`].
        true_l0: mean number of atoms that are on [`true_l0`].
        nearest: nearest atom of each latent.
        matched: the latent of each atom; −1 without.
        cosine: |cos| of each atom and its latent; NaN without.
        intervals: figure → 95 % interval (low, high) over tokens, which must be independent, as those of
            `PlantedWorld` are.
    """

    title: ClassVar[str] = "Planted atoms"
    n_tokens: int
    mmcs: float
    coverage: float
    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    atom_f1: float
    shrinkage: float
    norm_ratio: float
    explained_variance: float
    dead: int
    l0: float
    true_l0: float
    latent_precision: Float[Tensor, "d_sae"]
    latent_recall: Float[Tensor, "d_sae"]
    latent_f1: Float[Tensor, "d_sae"]
    nearest: Int[Tensor, "d_sae"]
    matched: Int[Tensor, "n"]
    cosine: Float[Tensor, "n"]
    intervals: dict[str, tuple[float, float]]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per figure: `figure`, `value`, and, where known, the 95 % interval from `low` to `high`."""
        import pandas as pd

        low, high = zip(*(self.intervals.get(name, (math.nan, math.nan)) for name in _FIGURES), strict=True)
        values = [float(getattr(self, name)) for name in _FIGURES]
        return pd.DataFrame({"figure": _FIGURES, "value": values, "low": low, "high": high})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Return |cos| of every atom and its latent, the best found first."""
        figures = importlib.import_module("interp.report.figures")
        found = {"with its latent": self.cosine.nan_to_num(0).sort(descending=True).values}
        return figures.line(found, x=figures.Axis("atoms, best found first"), title=self.title, value="|cos|")

    def summary(self) -> str:
        """Say the main figures."""
        return (
            f"{len(self.matched)} atoms, {len(self.nearest)} latents, {self.n_tokens:,} tokens: MCC {self.mcc:.4f}, "
            f"uniqueness {self.uniqueness:.4f}, F1 {self.f1:.4f} (precision {self.precision:.4f}, recall "
            f"{self.recall:.4f}; by atom {self.atom_f1:.4f}), dead {self.dead}\n"
            f"explained variance {self.explained_variance:.4f}, L0 {self.l0:.2f} (true {self.true_l0:.2f}), magnitudes "
            f"at {self.shrinkage:.3f} of the true ones, ‖x̂‖ / ‖x‖ {self.norm_ratio:.3f}"
        )


@torch.no_grad()
def planted_scores(
    dictionary: Dictionary,
    atoms: Float[Tensor, "n d"],
    codes: Float[Tensor, "token n"],
    x: Float[Tensor, "token d"],
) -> PlantedScores:
    """Score a dictionary against the atoms that activations were made of.

    Counts are kept as integers and sums in fp64. Memory, in bytes: 16 · n · d_sae for the matching, and 64 MiB for
    latents.

    Args:
        dictionary: a dictionary of such activations.
        atoms: the true directions.
        codes: how much of each is in each token; 0 where it is not.
        x: the activations.

    Returns:
        The scores; `PlantedScores` says which equal SAELens'.

    Raises:
        ShapeError: shapes that do not fit together, or a dictionary of another width.
        DataError: values that are not finite, codes below 0, an atom of norm 0, or activations that do not vary.
        ConfigError: too many atoms and latents to match.

    Source: SynthSAEBench (2602.14687) and `sae_lens.synthetic.eval_sae_on_synthetic_data`; MCC: Song et al. 2025
    (2505.20254). Departures: `shrinkage` is that of latents, SAELens' figure of that name is `norm_ratio`; `atom_f1`
    counts each atom once.
    """
    _check(dictionary, atoms, codes, x)
    device = dictionary.W_dec.device
    atoms, codes, x = (tensor.to(device) for tensor in (atoms, codes, x))
    nearest = best_cosines(dictionary, atoms, absolute=True)[1]
    pairs = matched_cosine(atoms, dictionary, absolute=True)
    counts = _Counts(dictionary, atoms, nearest, pairs.a.to(device), pairs.b.to(device), x.double().mean(0))
    for part, latents in encoded_in_parts(dictionary, x[:, None]):
        counts.add(x[part].double(), codes[part], latents[:, 0])
    matched = torch.full((len(atoms),), -1)
    matched[pairs.a] = pairs.b
    cosine = torch.full((len(atoms),), math.nan, dtype=torch.float64)
    cosine[pairs.a] = pairs.cosine.abs()
    found, backward = mmcs(dictionary, atoms, absolute=True)
    precision, recall, f1 = counts.latent_scores()
    metadata = dictionary.cfg.metadata
    return PlantedScores(
        n_tokens=len(x),
        mmcs=found,
        coverage=backward,
        mcc=pairs.mean,
        uniqueness=uniqueness(dictionary, atoms),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        dead=int((counts.fires == 0).sum()),
        latent_precision=precision,
        latent_recall=recall,
        latent_f1=f1,
        nearest=nearest.cpu(),
        matched=matched,
        cosine=cosine,
        provenance=Provenance(model=str(metadata.get("model_name", "")), settings={"n_atoms": len(atoms)}),
        **counts.matched_scores(),
        **counts.by_token(),
    )


def _check(dictionary: Dictionary, atoms: Tensor, codes: Tensor, x: Tensor) -> None:
    shapes = f"atoms {tuple(atoms.shape)}, codes {tuple(codes.shape)}, x {tuple(x.shape)}"
    if atoms.ndim != 2 or x.ndim != 2 or codes.shape != (len(x), len(atoms)) or x.shape[1] != atoms.shape[1]:
        raise ShapeError(f"{shapes}; expected [n d], [token n] and [token d]")
    if dictionary.W_dec.shape[1] != x.shape[1] or dictionary.cfg.d_in != x.shape[1]:
        raise ShapeError(f"{shapes}, and a dictionary of d_in {dictionary.cfg.d_in}; another world?")
    for name, tensor in (("atoms", atoms), ("codes", codes), ("x", x)):
        if not bool(tensor.isfinite().all()):
            raise DataError(f"{name} are NaN or infinite at {int((~tensor.isfinite()).sum())} places; find where")
    if bool((codes < 0).any()) or bool((atoms.norm(dim=1) == 0).any()):
        raise DataError(
            "a code is below 0, or an atom is the zero vector; codes are 0 where an atom is off, else above"
        )
    if len(x) < 2 or not bool((x != x[0]).any()):
        raise DataError(f"x has {len(x)} tokens that do not differ; give at least two that do")


class _Counts:
    """What is counted over tokens: firings against atoms, magnitudes of matched pairs, and errors."""

    def __init__(
        self, dictionary: Dictionary, atoms: Tensor, nearest: Tensor, atom: Tensor, latent: Tensor, mean: Tensor
    ) -> None:
        self.dictionary, self.nearest, self.atom, self.latent, self.mean = dictionary, nearest, atom, latent, mean
        self.size = dictionary.W_dec.double().norm(dim=1)[latent] / atoms.double().norm(dim=1)[atom]
        empty = torch.zeros(len(nearest), dtype=torch.long, device=mean.device)
        self.fires, self.has, self.hits = empty.clone(), empty.clone(), empty.clone()
        self.of_pair = torch.zeros(5, len(atom), dtype=torch.float64, device=mean.device)
        self.tokens: list[Tensor] = []

    def add(self, x: Float[Tensor, "token d"], codes: Tensor, latents: Float[Tensor, "token d_sae"]) -> None:
        near = self.dictionary.reconstructed(latents, x).double()
        if not bool(near.isfinite().all()):
            raise DataError("the dictionary's reconstruction is NaN or infinite at finite activations; is it damaged?")
        active, on = latents != 0, codes > 0
        here = on[:, self.nearest]
        self.fires += active.sum(0)
        self.has += here.sum(0)
        self.hits += (active & here).sum(0)
        mine, its = latents[:, self.latent].double(), codes[:, self.atom].double()
        both: Bool[Tensor, "token pair"] = (mine != 0) & (its > 0)
        sums = [mine * both, its * both, both, mine != 0, its > 0]
        self.of_pair += torch.stack([s.double().sum(0) for s in sums])
        norms, ours = x.norm(dim=1), near.norm(dim=1)
        counted = norms > _SMALLEST_NORM
        ratio = (ours / norms.where(counted, 1)).where(counted, 0)
        missed, spread = (x - near).pow(2).sum(1), (x - self.mean).pow(2).sum(1)
        columns = [missed, spread, ratio, counted.double(), active.sum(1).double(), on.sum(1).double()]
        self.tokens.append(torch.stack(columns).cpu())

    def latent_scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Precision, recall and F1 of each latent for its nearest atom."""
        fires, has, hits = (n.double().cpu() for n in (self.fires, self.has, self.hits))
        return hits / fires.clamp_min(1), hits / has.clamp_min(1), 2 * hits / (fires + has).clamp_min(1)

    def matched_scores(self) -> dict[str, Any]:
        """F1 and magnitude of the matched pairs."""
        mine, its, both, fires, has = self.of_pair
        ratio = (mine * self.size / its)[both > 0]
        return {
            "atom_f1": float((2 * both / (fires + has).clamp_min(1)).mean()),
            "shrinkage": float(ratio.mean()) if len(ratio) else math.nan,
        }

    def by_token(self) -> dict[str, Any]:
        """Figures that are ratios of sums over tokens, with their intervals."""
        missed, spread, ratio, counted, active, on = torch.cat(self.tokens, 1)
        one = torch.ones_like(active)
        pairs = {"fvu": (missed, spread), "norm_ratio": (ratio, counted), "l0": (active, one), "true_l0": (on, one)}
        ends = {name: ratio_interval(*pair) for name, pair in pairs.items()}
        low, high = ends.pop("fvu")
        found = {name: float(a.sum() / b.sum()) for name, (a, b) in pairs.items()}
        ends["explained_variance"] = (1 - high, 1 - low)
        explained = 1 - found.pop("fvu")
        return {**found, "explained_variance": explained, "intervals": ends}
