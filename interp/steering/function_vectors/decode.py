"""What a function vector says of tokens, and how much of the function those tokens hold."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ConfigError
from interp.core.manager import HookManager
from interp.core.readout import Readout
from interp.core.result import Provenance, Result, token_names
from interp.steering.function_vectors.vector import FunctionVector

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["DecodedVector", "decode_vector", "reconstruct_vector"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DecodedVector(Result):
    """The tokens that a vector means when the unembedding reads it.

    Attributes:
        task: the function.
        tokens: the most likely tokens, as text.
        ids: their ids.
        probs: their probabilities.
    """

    title: ClassVar[str] = "Tokens of a function vector"
    task: str
    tokens: list[str]
    ids: Int[Tensor, " token"]
    probs: Float[Tensor, " token"]

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per token."""
        import pandas as pd

        return pd.DataFrame({"token": self.tokens, "id": self.ids.tolist(), "prob": self.probs.tolist()})

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the probabilities."""
        from interp.report.figures import Axis, bars

        title = f"What the vector of {self.task!r} says"
        return bars(self.probs, labels=Axis("token", self.tokens), title=title, value="probability")

    def summary(self) -> str:
        """Name the tokens."""
        named = ", ".join(f"{t!r} {p:.3g}" for t, p in zip(self.tokens, self.probs.tolist(), strict=True))
        return f"{self.task}: {named}"


@torch.no_grad()
def decode_vector(hm: HookManager, vector: FunctionVector, k: int = 10) -> DecodedVector:
    """Read a function vector through the final norm and the unembedding, as if it were the whole stream.

    Args:
        hm: the model.
        vector: the vector.
        k: tokens.

    Raises:
        ConfigError: more tokens than there are.
        ModelError: an unembedding that is not linear, or a vector of another model.

    Source: Todd et al. (2023), arXiv 2310.15213, §3.2.
    """
    vector.direction.check(hm)
    probs = _read(hm, vector.vector).softmax(-1).cpu()
    top = probs.topk(_checked(k, len(probs)))
    return DecodedVector(
        provenance=Provenance.of(hm, settings={"task": vector.task, "k": k}, data=[vector.vector]),
        task=vector.task,
        tokens=token_names(hm, top.indices),
        ids=top.indices,
        probs=top.values,
    )


def reconstruct_vector(
    hm: HookManager, vector: FunctionVector, k: int = 100, *, steps: int = 300, lr: float = 0.1, seed: int = 0
) -> FunctionVector:
    """Find a vector that says the same tokens: how much of the function lies in what the vector decodes to.

    v̂ minimises the cross-entropy between the k most likely tokens of v, their probabilities made to sum to 1, and what
    v̂ decodes to; by Adam from a random start. The final norm makes this blind to the length of v̂ (up to its ε), so v̂
    is given that of v. Score it with `evaluate_function_vector` beside v.

    Args:
        hm: the model.
        vector: the vector.
        k: tokens that count.
        steps: of the optimiser.
        lr: its step, in units of the root mean square entry of v.
        seed: of the start.

    Returns:
        v̂ in the place of v; `notes` says the cross-entropy reached and its least value, the entropy of the tokens.

    Raises:
        ConfigError: counts or a step that cannot be.
        ModelError: a vector of another model.

    Source: Todd et al. (2023), arXiv 2310.15213, §3.2. Departure: the length.
    """
    if type(steps) is not int or steps < 1 or not lr > 0:
        raise ConfigError(f"steps={steps!r}, lr={lr!r}: expected a whole number ≥ 1 and a step > 0")
    vector.direction.check(hm)
    v = vector.vector
    size = v.norm() / len(v) ** 0.5
    with torch.no_grad():
        top = _read(hm, v).softmax(-1).topk(_checked(k, hm.d_vocab))
        wanted = top.values / top.values.sum()
    x = (size * torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr * float(size))
    with torch.enable_grad():
        for _ in range(steps):
            loss = -(wanted * _read(hm, x).log_softmax(-1)[top.indices]).sum()
            (x.grad,) = torch.autograd.grad(loss, [x])
            optimizer.step()
    made = x.detach()
    least = -(wanted * wanted.log()).sum()
    note = (
        f"rebuilt from {k} decoded tokens: cross-entropy {float(loss.detach()):.3f} nats, at least {float(least):.3f}"
    )
    parts = (made * v.norm() / made.norm())[None]
    return replace(vector, task=f"{vector.task}, rebuilt", parts=parts, notes=[*vector.notes, note])


def _read(hm: HookManager, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_vocab"]:
    return Readout.of(hm).logits(vector.to(hm.dtype)[None])[0].float()


def _checked(k: int, most: int) -> int:
    if type(k) is not int or not 1 <= k <= most:
        raise ConfigError(f"k={k!r}: expected 1 to {most} tokens")
    return k
