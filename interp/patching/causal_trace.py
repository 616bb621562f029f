"""Causal tracing: noise on the subject's embeddings, and where restoring the clean states brings the answer back.

Source: Meng et al. (2022), arXiv 2202.05262, §2. Departures: the noise is drawn once for all cells (as in the authors'
code, once per copy), and every restored cell runs on the sweep engine, so the cells are those of one forward each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Replace
from interp.core.manager import HookManager
from interp.core.metrics import Metric
from interp.core.result import Provenance, Result
from interp.core.site import Site
from interp.core.sweep import sweep
from interp.core.text import Tokens
from interp.data.pair_tokens import PairTokens
from interp.data.pairs import PromptPairs
from interp.patching.places import position_places
from interp.patching.restore import restoring_cells

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

__all__ = ["PANELS", "CausalTrace", "causal_trace"]

PANELS = ("resid_post", "mlp_out", "attn_out")
_NAMES = {"resid_post": "hidden state", "mlp_out": "MLP", "attn_out": "attention"}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CausalTrace(Result):
    """How much of an answer's probability each restored state brings back.

    Attributes:
        kinds: What is restored: "resid_post" (one layer's hidden state), "mlp_out" and "attn_out" (windows of layers).
        columns: Labels of the positions.
        restored: p of the answer in the noised run with one cell restored, mean over the noise copies.
        clean: p of the answer.
        noised: p of the answer with the subject noised, mean over the copies.
        window: Layers that are restored together, for MLPs and attention.
        sigma: Standard deviation of the subjects' embeddings, of which the noise has three.
        notes: What a reader should know.
    """

    title: ClassVar[str] = "Causal trace"
    kinds: list[str]
    columns: list[str]
    restored: Float[Tensor, "kind layer pos batch"]
    clean: Float[Tensor, " batch"]
    noised: Float[Tensor, " batch"]
    window: int
    sigma: float
    notes: list[str] = field(default_factory=list)

    @property
    def total_effect(self) -> Float[Tensor, " batch"]:
        """TE = p − p*, per example."""
        return self.clean - self.noised

    @property
    def indirect_effect(self) -> Float[Tensor, "kind layer pos batch"]:
        """IE = p*(restored) − p*, per example."""
        return self.restored - self.noised

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per kind, layer, position and example."""
        import pandas as pd

        grids = torch.meshgrid(*map(torch.arange, self.restored.shape), indexing="ij")
        kind, layer, pos, example = (grid.flatten().tolist() for grid in grids)
        return pd.DataFrame(
            {
                "kind": [self.kinds[k] for k in kind],
                "layer": layer,
                "pos": pos,
                "label": [self.columns[p] for p in pos],
                "example": example,
                "restored": self.restored.flatten().tolist(),
                "indirect_effect": self.indirect_effect.flatten().tolist(),
                "total_effect": [float(self.total_effect[e]) for e in example],
            }
        )

    def plot(self) -> "plotly.graph_objects.Figure":
        """Draw the average indirect effect: positions × layers, a panel for each kind."""
        from interp.report.panels import heat_panels

        return heat_panels(
            {self._panel(kind): self.indirect_effect[i].mean(-1).T for i, kind in enumerate(self.kinds)},
            rows=self.columns,
            across="layer (centre of the window)",
            value="average indirect effect on p(answer)",
            title=self.title,
        )

    def _panel(self, kind: str) -> str:
        name = _NAMES.get(kind, kind)
        return name if kind == "resid_post" else f"{name}, {self.window} layers"

    def summary(self) -> str:
        """Give the total effect and each kind's strongest cell."""
        te = self.total_effect
        lines = [
            f"p(answer): clean {float(self.clean.mean()):.3g}, subject noised {float(self.noised.mean()):.3g}; "
            f"average total effect {float(te.mean()):.3g} ({len(te)} prompts)"
        ]
        for kind, values in zip(self.kinds, self.indirect_effect.mean(-1), strict=True):
            layer, pos = divmod(int(values.argmax()), values.shape[1])
            lines.append(
                f"{self._panel(kind)}: most at layer {layer}, position {self.columns[pos]} ({float(values.max()):+.3g})"
            )
        return "\n".join([*lines, *self.notes])


def causal_trace(
    hm: HookManager,
    pairs: PromptPairs | PairTokens,
    *,
    subject: str = "subject",
    kinds: Sequence[str] = PANELS,
    window: int = 10,
    n_noise: int = 10,
    seed: int = 0,
) -> CausalTrace:
    """Noise the subject's embeddings and restore one clean state, or window of layers, at a time.

    Only the clean prompts are used. Noise is N(0, (3σ)²), σ the standard deviation of the embeddings of all subject
    tokens of the data. Memory: the clean activations of the kinds, and a sweep over prompts · n_noise rows.

    Args:
        hm: The model.
        pairs: Prompts with a named subject and an answer.
        subject: The name of its span.
        kinds: Of "resid_post", "mlp_out" and "attn_out".
        window: Layers restored together around each layer, for MLPs and attention; 1 for that layer alone.
        n_noise: Noised copies of each prompt.
        seed: Of the noise.

    Returns:
        Probabilities per cell and prompt, averaged over the copies.

    Raises:
        DataError: No span of that name.
        ConfigError: A window or a number of copies below 1, or another kind.

    Source: Meng et al. (2022), arXiv 2202.05262, §2.1: p, p*, TE = p − p*, IE = p*(restored) − p*.
    """
    wrong = next((k for k in kinds if k not in PANELS), None)
    if wrong is not None or not kinds:
        raise ConfigError(f"kinds={list(kinds)!r}: expected some of {', '.join(PANELS)}")
    for name, value in (("window", window), ("n_noise", n_noise)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}={value!r}: expected a whole number ≥ 1")
    tokens = pairs.tokens(hm) if isinstance(pairs, PromptPairs) else pairs
    if subject not in tokens.clean.spans:
        known = ", ".join(tokens.clean.spans) or "none"
        raise DataError(f"the clean prompts have no span {subject!r}; they have {known}")
    sites = [Site(f"{layer}.{kind}") for kind in kinds for layer in range(hm.n_layers)]
    clean = hm.run(tokens.clean, read=["embed", *sites], logits="last")
    answer = tokens.metric("log_prob")
    places = position_places(tokens.clean, tokens.clean, None, hm.tokenizer)
    many = _copies(tokens.clean, n_noise)
    span = many.spans[subject]
    sigma = float(clean["embed"][tokens.clean.spans[subject].to(clean["embed"].device)].float().std())
    noise = 3 * sigma * torch.randn(int(span.sum()), hm.d_model, generator=torch.Generator().manual_seed(seed))
    embed = clean["embed"].repeat(n_noise, 1, 1)
    embed[span.to(embed.device)] += noise.to(embed)
    columns = places.columns.repeat(1, n_noise, 1)
    values = {site: clean[site].repeat(n_noise, 1, 1) for site in sites}
    cells = [restoring_cells(k, layer, values, columns, window=window) for k in kinds for layer in range(hm.n_layers)]
    found = sweep(hm, many, cells, [_probability(answer, n_noise)], write=[Replace("embed", embed)])
    shape = (len(kinds), hm.n_layers, len(places.labels), n_noise, len(tokens))
    settings = {"subject": subject, "kinds": list(kinds), "window": window, "n_noise": n_noise}
    return CausalTrace(
        provenance=Provenance.of(hm, settings=settings, data=(tokens.clean.ids,), seed=seed),
        kinds=list(kinds),
        columns=places.labels,
        restored=found.values[0].reshape(shape).mean(-2),
        clean=answer(clean).detach().float().cpu().exp(),
        noised=found.base[0].unflatten(-1, (n_noise, -1)).mean(-2),
        window=window,
        sigma=sigma,
        notes=found.notes,
    )


def _copies(tokens: Tokens, n: int) -> Tokens:
    """The prompts n times over, one copy of all after another."""
    spans = {name: span.repeat(n, 1) for name, span in tokens.spans.items()}
    return Tokens(
        tokens.ids.repeat(n, 1), tokens.mask.repeat(n, 1), spans=spans, bos=tokens.bos, tokenizer=tokens.tokenizer
    )


def _probability(answer: Metric, copies: int) -> Metric:
    def of(logits: Tensor, rows: Tensor) -> Tensor:
        return answer.of(logits, rows % answer.n).exp()

    return Metric("probability", of, answer.n * copies, answer.columns)
