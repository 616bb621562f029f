"""Try many vectors at many layers: each is added at the last token, and the answer is looked at."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.manager import HookManager
from interp.core.sweep import Sweep
from interp.core.sweep_cells import Cells
from interp.data.pairs import PromptPairs
from interp.steering.function_vectors.options import ICLOptions, chunks, last_column

__all__ = ["Tried", "try_vectors"]


class Tried:
    """What vectors did to the answers of prompts.

    Attributes:
        right: 1 where the first token of an answer is the most likely one, else 0.
        log_prob: log-probability of the answer's first token, in nats.
        base_right, base_log_prob: the same without a vector.
    """

    def __init__(self, values: Float[Tensor, "two vector layer row"], base: Float[Tensor, "two row"]) -> None:
        self.right, self.log_prob = (values[0] == 0).float(), values[1]
        self.base_right, self.base_log_prob = (base[0] == 0).float(), base[1]


def try_vectors(
    hm: HookManager,
    pairs: PromptPairs,
    vectors: Float[Tensor, "vector layer d_model"],
    layers: Sequence[int],
    *,
    side: str = "clean",
    options: ICLOptions | None = None,
) -> Tried:
    """Add each vector at `resid_post` of each layer, at the last token of prompts.

    One sweep: only the last column is run again, from the layer on.

    Args:
        hm: the model.
        pairs: the prompts and their answers.
        vectors: for each layer, in the order of `layers`.
        layers: blocks, in ascending order.
        side: which prompts of the pairs.
        options: batch size, engine and budget.
    """
    options = options or ICLOptions()
    n, values, base = len(vectors), [], []
    for part in chunks(pairs, options.batch_size):
        held = part.tokens(hm, side="left", same_length=False)
        tokens = held.clean if side == "clean" else held.corrupted
        batch, width = tokens.ids.shape
        columns = last_column(n, batch, width)
        cells = [Cells(f"{layer}.resid_post", columns, _Adding(vectors[:, i])) for i, layer in enumerate(layers)]
        metrics = [held.metric("rank"), held.metric("log_prob")]
        sweep = Sweep(hm, tokens, cells, metrics, engine=options.engine, budget_bytes=options.budget_bytes)
        found = torch.full((2, len(sweep), batch), torch.nan)
        for done in sweep:
            found[:, done.cells] = done.values
        values.append(found.unflatten(1, (len(layers), n)).transpose(1, 2))
        base.append(sweep.base)
    return Tried(torch.cat(values, -1), torch.cat(base, -1))


class _Adding:
    """New values of cells: the activation plus each cell's vector."""

    def __init__(self, vectors: Float[Tensor, "cell d_model"]) -> None:
        self.vectors = vectors

    def __call__(self, x: Float[Tensor, "n batch pos d_model"], pick: Int[Tensor, " n"], first: int) -> Tensor:
        return x + self.vectors[pick].to(x)[:, None, None]
