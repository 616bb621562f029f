"""To and from the folders of EleutherAI's sparsify: one for each hookpoint, with `cfg.json` and `sae.safetensors`."""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from interp.core.disk import appear
from interp.core.errors import ArtifactError
from interp.dictionaries.base import Dictionary
from interp.dictionaries.folder import CFG
from interp.dictionaries.foreign import RAW_MODEL, assembled, read_settings, read_tensors, vacant, whole_number
from interp.dictionaries.topk import TopKSAE
from interp.dictionaries.topk_transcoder import TopKTranscoder

__all__ = ["SPARSIFY_WEIGHTS", "from_sparsify", "to_sparsify"]

SPARSIFY_WEIGHTS = "sae.safetensors"

_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)[._](\d+)(?:\.(\w+))?")
# The last word of a hookpoint, which names a module → the site of what that module gives.
_OUTPUTS = {None: "hook_resid_post", "mlp": "hook_mlp_out"}
_OUTPUTS.update(dict.fromkeys(("attn", "self_attn", "attention", "self_attention"), "hook_attn_out"))
_INPUTS = {None: "hook_resid_pre", "mlp": "mlp.hook_in"}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")


def from_sparsify(folder: str | Path) -> TopKSAE | TopKTranscoder:
    """Read a sparse coder that sparsify wrote.

    The site follows from the folder's name, sparsify's hookpoint: a module, whose output an SAE reads, and whose input
    and output a transcoder takes. Where a norm follows the MLP (Gemma 2 and 3), the module's output is not `mlp_out`.

    Args:
        folder: of one hookpoint, such as `layers.5.mlp`.

    Returns:
        A TopK SAE or transcoder, with the hookpoint in its metadata.

    Raises:
        ArtifactError: the folder is damaged, or holds what is no TopK SAE or transcoder.

    Source: EleutherAI/sparsify 1.3, `SparseCoder`.
    """
    path = Path(folder)
    cfg = read_settings(path / CFG)
    _refuse_others(cfg, path)
    d, k = whole_number(cfg, "d_in", path / CFG), whole_number(cfg, "k", path / CFG)
    # 0 stands for "as the expansion says".
    name = "num_latents" if cfg.get("num_latents") else "expansion_factor"
    n = whole_number(cfg, name, path / CFG) * (1 if name == "num_latents" else d)
    transcode, skip = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (n, d),
        "encoder.bias": (n,),
        "W_dec": (n, d),
        "b_dec": (d,),
    }
    held = read_tensors(path / SPARSIFY_WEIGHTS, {**shapes, **({"W_skip": (d, d)} if skip else {})})
    weights = {
        "W_enc": held["encoder.weight"].T,
        "b_enc": held["encoder.bias"],
        **{name: held[name] for name in held if not name.startswith("encoder.")},
    }
    settings = {"k": k, "metadata": _metadata(path, transcode)}
    if not transcode:
        return assembled(TopKSAE, {**settings, "architecture": "topk"}, weights, path)
    architecture = "topk_skip_transcoder" if skip else "topk_transcoder"
    return assembled(TopKTranscoder, {**settings, "architecture": architecture, "d_out": d}, weights, path)


def to_sparsify(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a TopK SAE or transcoder as a folder that sparsify's `SparseCoder.load_from_disk` reads.

    Args:
        dictionary: latents chosen by their size times the norm of their decoder row become latents of that size.
        folder: where; its name should be the hookpoint, such as `layers.5`. It must not be there, or be empty.

    Returns:
        The folder.

    Raises:
        ArtifactError: another architecture, a transcoder between spaces of two widths, or a folder that is in use.
    """
    made = dictionary if isinstance(dictionary, TopKTranscoder) else dictionary.frozen()
    if not isinstance(made, TopKSAE | TopKTranscoder):
        raise ArtifactError(
            f"sparsify knows TopK SAEs and TopK transcoders, and this is a {type(made).__name__}; save it in SAELens' "
            "format, or a transcoder in circuit-tracer's"
        )
    if made.d_out != made.cfg.d_in:
        raise ArtifactError(f"sparsify's transcoders have one width; this reads {made.cfg.d_in}, gives {made.d_out}")
    # Heads that are read side by side are no more than that to it.
    if (how := made.cfg.normalize_activations) != "none":
        raise ArtifactError(f"sparsify cannot say normalize_activations={how!r}; keep it in SAELens' format")
    target = vacant(folder)
    if isinstance(made, TopKSAE) and made.cfg.rescale_acts_by_decoder_norm:
        made = deepcopy(made)
        made.fold_decoder_norm()
    b_enc = made.b_enc.detach()
    if isinstance(made, TopKSAE) and not made.cfg.apply_b_dec_to_input:
        # Its SAEs always take b_dec out of the input.
        b_enc = b_enc + made.b_dec.detach() @ made.W_enc.detach()
    state = {"encoder.weight": made.W_enc.detach().T, "encoder.bias": b_enc, "W_dec": made.W_dec, "b_dec": made.b_dec}
    if made.has_skip:
        state["W_skip"] = made.W_skip
    settings = {
        "activation": "topk",
        "d_in": made.cfg.d_in,
        "expansion_factor": max(1, made.cfg.d_sae // made.cfg.d_in),
        "k": made.cfg.k,
        "multi_topk": False,
        "normalize_decoder": False,
        "num_latents": made.cfg.d_sae,
        "skip_connection": made.has_skip,
        "transcode": isinstance(made, TopKTranscoder),
    }

    def write(draft: Path) -> None:
        from safetensors.torch import save_file

        held = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(held, draft / SPARSIFY_WEIGHTS)
        (draft / CFG).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    return appear(target, write)


def _refuse_others(cfg: Mapping[str, Any], path: Path) -> None:
    activation = cfg.get("activation", "topk")
    if activation != "topk":
        raise ArtifactError(
            f"{path} holds a sparse coder with activation {activation!r}, which cannot be loaded: sparsify's groupmax "
            "keeps the largest latent of each group, and no dictionary here does"
        )
    if cfg.get("signed"):
        raise ArtifactError(
            f"{path} holds a signed sparse coder, which cannot be loaded: its latents may be negative, and every "
            "measure here takes them to be 0 or more"
        )
    if cfg.get("skip_connection") and not cfg.get("transcode"):
        raise ArtifactError(f"{path} holds an SAE with a skip connection; only transcoders have one here")


def _metadata(path: Path, transcode: bool) -> dict[str, Any]:
    """What the folder's name and the training's settings beside it say."""
    name = path.resolve().name if path.name in ("", ".", "..") else path.name
    found: dict[str, Any] = {"loaded_format": "sparsify", "sparsify_hookpoint": name}
    found["model_from_pretrained_kwargs"] = dict(RAW_MODEL)
    block = _BLOCK.fullmatch(name)
    if block is not None and block[2] in (_INPUTS if transcode else _OUTPUTS):
        at = f"blocks.{block[1]}."
        found["hook_name"] = at + (_INPUTS if transcode else _OUTPUTS)[block[2]]
        if transcode:
            found["hook_name_out"] = at + _OUTPUTS[block[2]]
    elif name in _EMBEDDINGS and not transcode:
        found["hook_name"] = "hook_embed"
    beside = path.parent / "config.json"
    training = read_settings(beside) if beside.is_file() else {}
    for key, ours in (("model", "model_name"), ("dataset", "dataset_path"), ("ctx_len", "context_size")):
        if isinstance(training.get(key), str | int):
            found[ours] = training[key]
    return found
