"""Every kind and form of dictionary, and each one's loss as a plain dense formula for autograd.

The formulas are written from the papers, by matrices over all latents, and share no code with the library. Where a
jump has no derivative, its stated estimate is a linear term whose value is 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from interp.data.store import Batch
from interp.dictionaries.base import Dictionary
from interp.dictionaries.options import DictionaryOptions
from interp.train.config import TrainOptions
from interp.train.trainer import train_dictionary

D_IN, D_OUT, D_SAE, K, TOKENS = 12, 10, 40, 4, 48

KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {},
    "jumprelu-l0": {"penalty": "l0", "bandwidth": 0.6, "pre_act": 0.1},
    "jumprelu-tanh": {"penalty": "tanh", "bandwidth": 0.6, "pre_act": 0.1},
    "standard": {},
    "gated": {},
    "gradient_topk": {"beta": 0.7},
    "feature_choice": {},
}
FORMS = ("sae", "transcoder", "skip_transcoder")
_BOTH = ("batchtopk", "jumprelu-l0", "jumprelu-tanh", "standard")
CASES = [(kind, form) for kind in KINDS for form in FORMS if form == "sae" or kind in _BOTH]
"""What can be trained: (kind, form)."""


def make(kind: str, form: str = "sae", *, seed: int = 0, dtype: str = "float64", **settings: Any) -> Any:
    """A dictionary with random weights, none of which are at rest: rows of other norms than 1, biases, thresholds."""
    options = {"d_sae": D_SAE, "k": K, **KINDS[kind], **settings}
    made: Any = DictionaryOptions(kind=kind.split("-")[0], form=form, **options).make(D_IN, D_OUT)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.0 if name == "W_dec" else 0.4))
        if kind.startswith("jumprelu"):
            made.threshold.abs_()
        if kind == "gated":
            made.b_gate.sub_(0.5)
    return made.to(getattr(torch, dtype))


def batch_for(made: Dictionary, *, masked: bool = False, seed: int = 0, tokens: int = TOKENS) -> Batch:
    """Random activations, gradients, a target where it must be another or the rows are masked, and a mask."""
    generator = torch.Generator().manual_seed(100 + seed)

    def draw(width: int) -> Tensor:
        return torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(made.W_enc.dtype) + 0.2

    x, target, grad = draw(D_IN), draw(made.d_out), draw(D_IN)
    mask = torch.arange(tokens) % 3 != 1 if masked else None
    return Batch(x=x, target=target if masked or made.d_out != D_IN else None, grad=grad, mask=mask)


@dataclass
class Dense:
    """What a dense formula gives: the loss with its graph, latents, and what is reported beside."""

    total: Tensor
    latents: Tensor
    fvu: Tensor
    penalty: Tensor
    aux: Tensor
    near: Tensor


def dense(kind: str, made: Any, batch: Batch, dead: Tensor | None = None) -> Dense:
    """The loss of a batch by the paper's formula, over all tokens and latents."""
    aims, terms = made.objective, made.terms
    rows = torch.ones(len(batch.x), dtype=torch.bool) if batch.mask is None else batch.mask
    x = batch.x[rows]
    y = x if batch.target is None else batch.target[rows]
    n = len(x)
    bias = made.b_gate if kind == "gated" else made.b_enc
    pre = (x - made.b_dec if made.cfg.apply_b_dec_to_input else x) @ made.W_enc + bias
    score = _score(kind, made, batch, rows, pre.detach())
    z, penalty, extra, near = _latents(kind, made, pre, score)
    rest = y - made.b_dec - (x @ made.W_skip.T if made.has_skip else 0)
    variance = (y - y.mean(0)).square().sum()
    unit = variance if terms.loss == "fvu" else n
    squares = [(rest - z[:, :first] @ made.W_dec[:first]).square().sum() for first in (*aims.prefixes, D_SAE)]
    total = sum(squares, start=torch.zeros(())) / len(squares) / unit
    if penalty is not None:
        total = total + made.warm * terms.sparsity * penalty
    if extra is not None:
        total = total + (y - made.b_dec.detach() - extra @ made.W_dec.detach()).square().sum() / unit
    aux = torch.zeros(())
    if dead is not None and bool(dead.any()):
        if kind.startswith("jumprelu"):
            below = ((made.threshold - pre).relu() * dead * made.W_dec.norm(dim=1)).sum()
            total = total + aims.pre_act * below / n
        if terms.aux_coef > 0:
            error = (rest - z @ made.W_dec).detach()
            ranked = score.masked_fill(~dead, -torch.inf).sort(dim=-1, descending=True).values
            chosen = (score >= ranked[:, made.k_aux - 1 : made.k_aux]) & dead
            code = pre * chosen
            guess = (code + (code.relu() - code).detach()) @ made.W_dec
            aux = (error - guess).square().sum() / error.square().sum()
            total = total + terms.aux_coef * (1 if terms.loss == "fvu" else variance / n) * aux
    none = torch.zeros((), dtype=x.dtype)
    return Dense(total, z.detach(), squares[-1].detach() / variance, none if penalty is None else penalty, aux, near)


def _score(kind: str, made: Any, batch: Batch, rows: Tensor, pre: Tensor) -> Tensor:
    if kind != "gradient_topk":
        return pre
    assert batch.grad is not None
    g = batch.grad[rows]
    effect = (g / g.norm(dim=1).mean() @ made.W_dec.detach().T).abs()
    z = pre.relu()
    return torch.where(pre > 0, z + made.objective.beta * z * effect, pre)


def _latents(kind: str, made: Any, pre: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    n, norm = len(pre), made.W_dec.norm(dim=1)
    resting = torch.zeros_like(pre, dtype=torch.bool)
    if kind in ("topk", "gradient_topk"):
        least = score.sort(dim=-1, descending=True).values[:, made.k_now - 1 : made.k_now]
        return pre.relu() * (score >= least), None, None, resting
    if kind == "batchtopk":
        least = score.flatten().sort(descending=True).values[made.k_now * n - 1]
        return pre.relu() * (score >= least), None, None, resting
    if kind == "feature_choice":
        budget = made.budget(n)
        columns = [pre[:, i] >= pre[:, i].sort(descending=True).values[int(m) - 1] for i, m in enumerate(budget)]
        kept = torch.stack(columns, 1) & (budget > 0)
        return pre.relu() * kept, None, None, resting
    if kind == "standard":
        z = pre.relu()
        return z, (z * norm).sum() / n, None, resting
    if kind == "gated":
        magnitude = ((pre - made.b_gate) * made.r_mag.exp() + made.b_mag).relu()
        return (pre > 0) * magnitude, (pre.relu() * norm).sum() / n, pre.relu(), resting
    theta, width = made.threshold, made.bandwidth
    open_ = (pre > theta).detach()
    near = ((pre - theta).abs() < width / 2).detach()
    moved = (pre if kind == "jumprelu-tanh" else pre.detach()) - theta  # its slopes are those of π − θ
    jump = near * (theta.detach() / width) * moved
    z = pre * open_ + jump - jump.detach()
    if kind == "jumprelu-tanh":
        return z, (made.objective.tanh_scale * z * norm).tanh().sum() / n, None, near
    step = near * (pre.detach() - theta) / width
    return z, (open_ + step - step.detach()).sum() / n, None, near


def with_aux(made: Any) -> Any:
    """The same dictionary with AuxK, where its own default is none."""
    made.terms = replace(made.terms, aux_coef=1 / 32)
    return made


def gradients(made: Dictionary, total: Tensor, x: Tensor | None = None) -> dict[str, Tensor]:
    """Of a loss, by name; of what it does not depend on, 0."""
    wanted = dict(made.named_parameters()) | ({} if x is None else {"x": x})
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), found, strict=True)}


def off(ours: Tensor, reference: Tensor) -> float:
    """The distance of two tensors, relative to the second where that is not tiny."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-6))


# -- planted atoms ----------------------------------------------------------------------------------------------------

ATOMS, D, BATCH = 64, 48, 512

# Weights of the penalty that leave about as many latents as there are atoms; thresholds move within wider bands than by
# default, for the run is short. The usage of Feature Choice has to be that of the atoms, which is the same for all.
RECIPES: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {},
    "jumprelu-l0": {"bandwidth": 0.5, "sparsity": 0.5},
    "jumprelu-tanh": {"bandwidth": 0.5, "sparsity": 0.5, "penalty": "tanh"},
    "standard": {"sparsity": 2.0},
    "gated": {"sparsity": 2.0},
    "gradient_topk": {"beta": 0.1},
    "feature_choice": {"zipf_alpha": 0.0},
}


def fitted(batches: Iterator[Batch], kind: str, *, d_in: int = D, k: int = 4, **changes: Any) -> Any:
    """A dictionary of a kind and as many latents as there are atoms, trained as its recipe says."""
    settings = {"d_sae": ATOMS, "k": k, **RECIPES[kind]}
    made = DictionaryOptions(kind=kind.split("-")[0], **settings).make(d_in)  # type: ignore[arg-type]
    run = TrainOptions(**{"tokens": 300_000, "batch_size": BATCH, "lr": 1e-2, **changes})
    train_dictionary(batches, made, run, progress=False)
    return made


def mmcs(atoms: Tensor, made: Any) -> float:
    """Mean, over atoms, of the largest cosine with a decoder row."""
    return float((atoms @ normalize(made.W_dec, dim=1).T).max(dim=1).values.mean())
