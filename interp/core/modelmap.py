"""`ModelMap`: where the parts of a transformer are in a module tree, and the facts that hooks need about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from interp.core.errors import ModelError

__all__ = ["ModelMap"]


@dataclass(frozen=True)
class ModelMap:
    """Where the parts of one model are, and how they are put together.

    Made by `HookManager.load` from TransformerLens' architecture adapters; give your own for any other module.

    Args:
        family: a name for messages, such as "llama".
        n_layers, d_model, n_heads, n_kv_heads, d_head, d_vocab: sizes.
        d_mlp: neurons of an MLP; None for a mixture of experts.
        paths: part → module path. Parts of a block hold `{layer}`. Known parts: embed, pos_embed, ln_final, unembed,
            block, ln1, ln1_post, ln2, ln2_post, attn, attn.q, attn.k, attn.v, attn.qkv, attn.o, attn.q_norm,
            attn.k_norm, mlp, mlp.in, mlp.gate, mlp.gate_up, mlp.out, mlp.router.
        attn_out: the part whose output (× residual_multiplier) attention adds to the residual stream.
        mlp_out: the same for the MLP.
        residual_multiplier: Granite's factor on both.
        parallel: attention and MLP read the same residual stream.
        qkv_layout: how rows of a fused projection are ordered: "concat" (all of q, then k, then v), "per_head"
            (q, k, v of head 0, then of head 1, …) or "grouped" (per key/value head: its queries, its key, its value).
        attention: "tap" where attention asks transformers' attention interface for its kernel; "inside" where the
            module calls softmax or scaled-dot-product attention itself.
        rotary: whether queries and keys are rotated between the projections and the attention.
        qk_norm_heads_first: q- and k-norms see [batch heads pos d] (True), [batch pos heads d] (False) or unknown.
        reasons: kind or part of a site's name → why this family has no such site.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    d_mlp: int | None
    paths: Mapping[str, str]
    attn_out: str = "attn"
    mlp_out: str = "mlp"
    residual_multiplier: float = 1.0
    parallel: bool = False
    qkv_layout: str | None = None
    attention: str = "tap"
    rotary: bool = True
    qk_norm_heads_first: bool | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "block" not in self.paths or "{layer}" not in self.paths["block"]:
            raise ModelError("a ModelMap needs paths['block'] with '{layer}' in it, such as 'model.layers.{layer}'")
        if self.qkv_layout not in (None, "concat", "per_head", "grouped"):
            raise ModelError(f"qkv_layout {self.qkv_layout!r}: expected None, 'concat', 'per_head' or 'grouped'")
        if self.attention not in ("tap", "inside"):
            raise ModelError(f"attention {self.attention!r}: expected 'tap' or 'inside'")

    def path(self, part: str, layer: int | None = None) -> str:
        """Return the module path of a part.

        Raises:
            ModelError: this family has no such part.
        """
        if part not in self.paths:
            raise ModelError(f"{self.family} has no part {part!r}; it has {', '.join(self.paths)}")
        return self.paths[part].format(layer=layer)

    def has(self, part: str) -> bool:
        """Whether this family has the part at all."""
        return part in self.paths

    def module(self, model: nn.Module, part: str, layer: int | None = None) -> nn.Module | None:
        """Return the module of a part, or None where this block has none."""
        if part not in self.paths:
            return None
        try:
            return model.get_submodule(self.path(part, layer))
        except AttributeError:
            return None

    def check(self, model: nn.Module) -> None:
        """Refuse a map whose embedding, blocks or unembedding are not in the model.

        Raises:
            ModelError: names the missing path and the paths that exist at the last level found.
        """
        for part in ("embed", "block", "ln_final", "unembed"):
            layers = range(self.n_layers) if part == "block" else (None,)
            for layer in layers:
                if part in self.paths and self.module(model, part, layer) is None:
                    here = ", ".join(name for name, _ in model.named_children())
                    raise ModelError(
                        f"the map of {self.family} puts {part} at {self.path(part, layer)!r}, which "
                        f"{type(model).__name__} does not have; its children are {here}. Give load(…, map=ModelMap(…))"
                    )
