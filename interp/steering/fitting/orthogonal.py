"""`orthogonalised`: a copy of a model none of whose weights can write along a direction."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import DataError, ModelError, ShapeError
from interp.core.fold import untie
from interp.core.intervention import Project
from interp.core.manager import HookManager
from interp.core.views import linear_weight
from interp.core.weights import readable

__all__ = ["orthogonalised", "stream_writers"]

_CLOSE, _CLOSE_IN_HALF = 1e-3, 0.5


def stream_writers(hm: HookManager) -> list[str]:
    """Return the sites at which the residual stream is written: its start, and the output of every sublayer."""
    outputs = [site.short for site in hm.atlas.sites() if site.kind in ("attn_out", "mlp_out")]
    return ["0.resid_pre", *outputs]


def orthogonalised(hm: HookManager, direction: Direction | Float[Tensor, " d_model"]) -> HookManager:
    """Return a manager over a copy whose every writing matrix has a direction projected out: W ← W − W v vᵀ.

    Embeddings, position embeddings, attention outputs and MLP outputs, with their biases, lose what they write along
    the direction, so that the copy predicts what the model predicts with the direction ablated at every layer and
    position. That is checked on sixteen random tokens. Memory: a second copy of the weights.

    Args:
        hm: the model; it stays as it is. W_E and W_U that are one tensor are two in the copy.
        direction: with one vector in the residual stream, or with the same one at all of its sites; or the vector.

    Raises:
        DataError: a direction with several vectors, or a zero one.
        ShapeError: another width than the stream's.
        ModelError: a direction of another model, norms or gates between the weights and the stream (Gemma 2, OLMo 2,
            BLOOM's embedding), a mixture of experts, quantised weights, or a copy that does not do what the ablation
            does.

    Source: Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", arXiv 2406.11717, eq. 5.
    """
    if isinstance(direction, Direction):
        direction.check(hm)
    v = _vector(hm, direction)
    m = hm.map
    between = [part for part in ("ln1_post", "ln2_post", "embed_ln") if m.has(part)]
    if between:
        raise ModelError(
            f"{m.family} has {', '.join(between)} between its weights and the residual stream, so no change of weights "
            "is this ablation; use direction.as_interventions(operation='ablate') at every layer"
        )
    twin = copy.deepcopy(hm.root)
    notes = ["the direction is projected out of every weight that writes to the residual stream"]
    if untie(twin, m):
        notes.append("W_E and W_U were one tensor in this model; in the copy they are two")
    with torch.no_grad():
        for part in ("embed", "pos_embed"):
            table: Any = m.module(twin, part)
            if table is not None:
                _project(table.weight, v)
        for layer in range(m.n_layers):
            for whole, part in (("attn", "attn.o"), ("mlp", "mlp.out")):
                module: Any = m.module(twin, part, layer)
                if module is None:
                    if m.module(twin, whole, layer) is None:
                        continue
                    raise ModelError(
                        f"block {layer} of {m.family} has no single {part!r} (a mixture of experts?), so what it "
                        "writes cannot be projected in its weights; ablate the direction with interventions"
                    )
                readable(module, m.path(part, layer))
                _project(linear_weight(module), v)
                if isinstance(getattr(module, "bias", None), Tensor):
                    _project(module.bias, v)
    name = f"{hm.name} (orthogonalised)"
    made = HookManager(twin, hm.tokenizer, m, name=name, revision=hm.revision, notes=[*hm.notes, *notes])
    made.is_folded = hm.is_folded
    _check_same(hm, made, v)
    return made


def _vector(hm: HookManager, direction: Direction | Tensor) -> Float[Tensor, " d_model"]:
    held: Sequence[Tensor] = list(direction.vectors.values()) if isinstance(direction, Direction) else [direction]
    first = held[0].detach().double().cpu()
    if first.shape != (hm.d_model,):
        raise ShapeError(f"the direction has shape {tuple(first.shape)}; the residual stream has [{hm.d_model}]")
    unit = first / first.norm()
    if not bool(unit.isfinite().all()):
        raise DataError("the direction is zero, NaN or infinite")
    for other in held[1:]:
        if other.shape != first.shape or float(other.double() @ unit / other.double().norm()) < 1 - 1e-6:
            raise DataError("the direction has several vectors; choose one with direction.at(site)")
    return unit


def _project(weight: Tensor, v: Float[Tensor, " d_model"]) -> None:
    """Take what rows [… d_model] have along v off, in place, in double precision where the device has it."""
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    u, old = v.to(weight.device, wide), weight.detach().to(wide)
    weight.copy_(old - (old @ u)[..., None] * u)


def _check_same(hm: HookManager, made: HookManager, v: Tensor) -> None:
    """Refuse a copy that predicts something else than the ablation: something else writes to the stream."""
    ids = torch.randint(0, hm.d_vocab, (2, 8), generator=torch.Generator().manual_seed(0))
    edits = [Project(site, v.float()) for site in stream_writers(hm)]
    wanted, found = (o.logits.float().log_softmax(-1) for o in (hm.run(ids, write=edits), made.run(ids)))
    half = hm.dtype in (torch.float16, torch.bfloat16)
    apart = (wanted - found).abs()
    # Half precision rounds the weights: what hardly ever comes next may be far off, what the model says may not.
    off = float((wanted.exp() * apart).sum(-1).max() if half else apart.max())
    if not off <= (_CLOSE_IN_HALF if half else _CLOSE):
        raise ModelError(
            f"{hm.map.family} cannot be orthogonalised: the copy's log-probabilities are {off:.1e} away from those of "
            "the ablation, so something that is not in the model's map writes to the stream; use interventions"
        )
