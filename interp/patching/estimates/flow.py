"""Information-flow routes: how much of what a receiver reads is each sender's, from one forward and no metric."""

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import DataError
from interp.core.inputs import Inputs
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.estimates.edge_scores import EdgeScores
from interp.patching.estimates.streams import Writers
from interp.patching.graph import Graph

__all__ = ["flow_routes"]

_BLOCK_BYTES = 2**22


def flow_routes(hm: HookManager, inputs: Inputs | PromptPairs | PairTokens) -> EdgeScores:
    """Score every edge by the share of the receiver's input that the sender makes up.

    weight(u → v) = max(0, ‖x_v‖₁ − ‖x_v − a_u‖₁), with x_v the stream that v reads and a_u what u adds to it,
    normalised over the senders of each token and averaged over real tokens. q, k and v heads of a block read one
    stream and get one set of weights.

    Cost: one forward. Memory, per token in numbers: n_layers·(n_heads·d_head + 2 d_model) + d_model; and for the few
    tokens multiplied out, 2 senders·d_model each, 4 MiB in all.

    Args:
        hm: the model.
        inputs: whatever `hm.run` takes; of pairs, the clean prompts.

    Raises:
        DataError: nothing to run.

    Source: Ferrando and Voita (2024), arXiv 2403.00824, §2.2, on the graph of Hanna et al. (2024), as EAP-IG has it.
    Departures: a head is one sender, not one per source token; nothing is thresholded.
    """
    pairs = inputs.tokens(hm) if isinstance(inputs, PromptPairs) else inputs
    tokens = hm.to_tokens(pairs.clean if isinstance(pairs, PairTokens) else pairs)
    writers, graph = Writers(hm), Graph.of(hm)
    last = f"{hm.n_layers - 1}.resid_post"
    middles = [_stream(hm, layer) for layer in range(hm.n_layers)]
    streams = [f"{layer}.resid_pre" for layer in range(hm.n_layers)] + [m for m in middles if m] + [last]
    run = hm.run(tokens, read=list(dict.fromkeys([*writers.reads, *streams])))
    values = writers.values(run)
    total = torch.zeros(len(graph.senders), len(graph.receivers), dtype=torch.float64)
    at = tokens.mask.flatten().nonzero()[:, 0]
    if not len(at):
        raise DataError("there are no tokens to follow")
    device = run[streams[0]].device
    for some in at.split(max(1, _BLOCK_BYTES // (8 * hm.d_model * len(graph.senders)))):
        here = some.to(device)
        added = torch.cat([writers.block(values, here, name) for name in writers.rows], dim=1)
        for site, until, columns in _readers(hm, writers, middles, last):
            stream = run[site].flatten(0, 1).index_select(0, here).float()
            total[:until, columns] += _shares(stream, added[:, :until]).sum(0).double().cpu()[:, None]
    return EdgeScores(
        provenance=Provenance.of(hm, settings={}, data=(tokens.ids, tokens.mask)),
        method="information flow",
        value="share of the receiver's input, mean over tokens",
        scores=(total / len(at)).float(),
        sizes=(graph.n_layers, graph.n_heads, graph.n_kv_heads),
        mlps=graph.mlps,
        parallel=graph.parallel,
        examples=len(tokens),
    )


def _stream(hm: HookManager, layer: int) -> str | None:
    """The stream that a block's MLP reads, or None where it has none."""
    if not hm.atlas.has(f"{layer}.mlp_out"):
        return None
    return f"{layer}.resid_pre" if hm.map.parallel else f"{layer}.resid_mid"


def _readers(hm: HookManager, writers: Writers, middles: list[str | None], last: str) -> list[tuple[str, int, slice]]:
    """Each stream that is read, how many senders come before it, and the columns of its receivers."""
    found, at = [], 0
    heads = hm.n_heads + 2 * hm.n_kv_heads
    for layer, middle in enumerate(middles):
        before, after = writers.rows[f"{layer}.z"]
        found.append((f"{layer}.resid_pre", before, slice(at, at + heads)))
        at += heads
        if middle is not None:
            found.append((middle, before if hm.map.parallel else after, slice(at, at + 1)))
            at += 1
    return [*found, (last, writers.n, slice(at, at + 1))]


def _shares(
    stream: Float[Tensor, "token d_model"], added: Float[Tensor, "token sender d_model"]
) -> Float[Tensor, "token sender"]:
    """The share of each sender in what is read."""
    whole = stream.abs().sum(-1, keepdim=True)
    nearer = (whole - (stream[:, None] - added).abs().sum(-1)).clamp(min=0.0)
    return nearer / nearer.sum(-1, keepdim=True).clamp(min=1e-12)
