"""The settings of a nano model, checked without transformers."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from interp.core.errors import ConfigError, nearest

__all__ = ["ACTIVATIONS", "MLPS", "NORMS", "POSITIONS", "NanoOptions"]

ACTIVATIONS = ("gelu", "gelu_new", "linear", "relu", "relu2", "sigmoid", "silu", "tanh")
MLPS = ("bilinear", "gated", "plain")
NORMS = ("layer", "none", "rms")
POSITIONS = ("learned", "none", "rotary", "shortformer")

_SIZES = ("d_vocab", "n_ctx", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_vocab_out")
_POSITIVE = ("norm_eps", "rotary_base", "attention_scale")
_SPREADS = ("init_std", "embed_std", "out_std")
_SWITCHES = ("norm_gain", "bias", "unembed_bias", "tied", "sink")


@dataclass(frozen=True, kw_only=True)
class NanoOptions:
    """What a nano model is made of; every combination runs, and those that cannot be are refused here.

    Args:
        d_vocab: tokens that go in.
        d_vocab_out: tokens that logits are about; by default d_vocab.
        n_ctx: positions that learned embeddings have, and the length that the model is meant for.
        n_layers: blocks.
        d_model: width of the residual stream.
        n_heads: query heads per block.
        n_kv_heads: key/value heads per block; by default n_heads.
        d_head: width of a head; by default d_model / n_heads.
        d_mlp: neurons per block; 0 for attention only, by default 4 · d_model.
        mlp: "plain": W_out act(W_in x); "gated": W_out (act(W_gate x) ⊙ W_in x); "bilinear": W_out (W_gate x ⊙ W_in x).
        act: the activation function, one of `ACTIVATIONS`; a bilinear MLP has none.
        norm: before attention, before the MLP and before the unembedding: "layer", "rms" or "none".
        norm_gain: whether norms have a learned gain (and "layer" a learned bias).
        norm_eps: added to the mean square, in squared units of the stream.
        positions: "learned" (added to the stream), "shortformer" (learned, added to what queries and keys read, and to
            nothing else), "rotary" (halves of q and k are rotated) or "none".
        rotary_base: θ of the rotation by pos · θ^(−2i/d_head).
        bias: biases of q, k, v, o and of the MLP; a gated or bilinear MLP has one on its output only.
        unembed_bias: a bias of the logits.
        tied: the unembedding is the embedding.
        sink: a learned extra key k′ and value v′ per key/value head, which every position can attend to.
        attention_scale: what q·k is multiplied by; by default d_head^(−1/2).
        init_std: standard deviation of new weights.
        embed_std: that of embeddings; by default init_std.
        out_std: that of W_O and W_out; by default init_std / √(2 n_layers).
        bos_token_id, eos_token_id, pad_token_id: special ids, if there are any.

    Raises:
        ConfigError: a setting is unknown or out of range, or two contradict each other.

    Source: attention sinks as explicit biases: Sun et al. (2024), "Massive Activations in Large Language Models",
    arXiv 2402.17762, §5. Departure: one pair per key/value head, not per query head, under grouped-query attention.
    Bilinear MLP: Pearce et al. (2024), arXiv 2410.08417. Shortformer: Press et al. (2020), arXiv 2012.15832.
    """

    d_vocab: int = 64
    d_vocab_out: int | None = None
    n_ctx: int = 128
    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 4
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    mlp: str = "plain"
    act: str = "gelu"
    norm: str = "layer"
    norm_gain: bool = True
    norm_eps: float = 1e-5
    positions: str = "learned"
    rotary_base: float = 10_000.0
    bias: bool = True
    unembed_bias: bool = False
    tied: bool = False
    sink: bool = False
    attention_scale: float | None = None
    init_std: float = 0.02
    embed_std: float | None = None
    out_std: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_words(self)
        _check_numbers(self)
        _check_together(self)

    def resolved(self) -> dict[str, Any]:
        """Return every setting by name, with the defaults that depend on others filled in."""
        found = asdict(self)
        missing = {
            "d_vocab_out": self.d_vocab,
            "n_kv_heads": self.n_heads,
            "d_head": self.d_model // self.n_heads,
            "d_mlp": 4 * self.d_model,
            "embed_std": self.init_std,
            "out_std": self.init_std / (2 * self.n_layers) ** 0.5,
        }
        found.update({name: value for name, value in missing.items() if found[name] is None})
        if found["attention_scale"] is None:
            found["attention_scale"] = float(found["d_head"]) ** -0.5
        return found

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the settings."""
        return tuple(field.name for field in fields(cls))


def _check_words(options: NanoOptions) -> None:
    known = {"mlp": MLPS, "act": ACTIVATIONS, "norm": NORMS, "positions": POSITIONS}
    for name, words in known.items():
        value = getattr(options, name)
        if value not in words:
            hint = nearest(str(value), words)
            raise ConfigError(f"{name}={value!r}: expected one of {', '.join(words)}{'; ' + hint if hint else ''}")
    for name in _SWITCHES:
        if not isinstance(getattr(options, name), bool):
            raise ConfigError(f"{name}={getattr(options, name)!r}: expected True or False")


def _check_numbers(options: NanoOptions) -> None:
    for name in (*_SIZES, "d_mlp"):
        value, least = getattr(options, name), int(name != "d_mlp")
        if value is None and getattr(NanoOptions, name) is None:
            continue
        if type(value) is not int or value < least:
            raise ConfigError(f"{name}={value!r}: expected a whole number ≥ {least}")
    for name in (*_POSITIVE, *_SPREADS):
        value = getattr(options, name)
        if value is None and getattr(NanoOptions, name) is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 <= value < float("inf")) or (value == 0 and name in _POSITIVE):
            raise ConfigError(f"{name}={value!r}: expected a finite number {'>' if name in _POSITIVE else '≥'} 0")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(options, name)
        if value is not None and (type(value) is not int or not 0 <= value < options.d_vocab):
            raise ConfigError(
                f"{name}={value!r}: expected an id from 0 to {options.d_vocab - 1} (d_vocab − 1), or None"
            )


def _check_together(options: NanoOptions) -> None:
    o = options
    if o.d_head is None and o.d_model % o.n_heads:
        raise ConfigError(f"d_model={o.d_model} is no multiple of n_heads={o.n_heads}; change one, or give d_head")
    n_kv = o.n_heads if o.n_kv_heads is None else o.n_kv_heads
    if o.n_heads % n_kv:
        raise ConfigError(
            f"n_heads={o.n_heads} is no multiple of n_kv_heads={n_kv}; every key head serves as many queries"
        )
    d_head = o.d_model // o.n_heads if o.d_head is None else o.d_head
    if o.positions == "rotary" and d_head % 2:
        raise ConfigError(f"d_head={d_head} is odd; rotary positions turn pairs, so give an even d_head")
    if o.tied and o.d_vocab_out not in (None, o.d_vocab):
        raise ConfigError(
            f"tied=True with d_vocab={o.d_vocab} and d_vocab_out={o.d_vocab_out}: one matrix has one size"
        )
