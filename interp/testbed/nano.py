"""Nano models: small transformers with many switches, the fixture of everything that is trained or built by hand here.

    model = nano(NanoOptions(d_vocab=50, n_layers=1, d_mlp=0, norm="none", positions="shortformer"), seed=0)
    hm = interp.HookManager.load(model)              # no map needed: the model brings its own
    model.save_pretrained(folder); interp.HookManager.load(folder)

A nano model is a Hugging Face model (model_type "interp_nano") of plain modules, named as Llama's are. What holds of
other families holds of it: the KV cache, padding, `generate`, SDPA and eager attention (eager alone with `sink=True`).
`AutoModelForCausalLM` knows it once `interp.testbed.nano_model` is imported, as every function here and
`HookManager.load(folder)` do.

With `sink=True` the learned extra slot (k′, v′) is no position: reads, masks and `Where` count tokens only. Rows of
`pattern` sum to 1 − p′, with p′ the slot's share; `z` is pattern @ v + p′ v′; `attn_scores` are relative to the slot's
own score (softmax over the scores and a 0 is the pattern); an edited pattern leaves the slot what its rows leave of 1.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.core.errors import ArtifactError
from interp.testbed.nano_options import NanoOptions
from interp.testbed.nano_weights import from_transformer_lens, to_transformer_lens_cfg, to_transformer_lens_names

if TYPE_CHECKING:
    from interp.testbed.nano_model import NanoConfig, NanoForCausalLM

__all__ = [
    "NanoOptions",
    "from_transformer_lens",
    "load_nano",
    "nano",
    "nano_config",
    "to_transformer_lens_cfg",
    "to_transformer_lens_names",
]


def nano_config(options: NanoOptions | None = None) -> "NanoConfig":
    """Return the Hugging Face config of a nano model.

    Args:
        options: the settings; by default a GPT-2-like model of two layers.
    """
    from interp.testbed.nano_model import NanoConfig

    return NanoConfig(**(options or NanoOptions()).resolved())


def nano(options: NanoOptions | None = None, *, seed: int = 0) -> "NanoForCausalLM":
    """Return a nano model with new weights, in fp32 on the CPU, in eval mode.

    Args:
        options: the settings; by default a GPT-2-like model of two layers.
        seed: of the weights; torch's own generator is left as it was.
    """
    from interp.testbed.nano_model import NanoForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NanoForCausalLM(nano_config(options)).to(torch.float32).eval()


def load_nano(folder: str | Path, *, dtype: "torch.dtype | None" = None) -> "NanoForCausalLM":
    """Load a nano model from a folder that `save_pretrained` wrote, in eval mode on the CPU.

    Args:
        folder: where config.json and the weights are.
        dtype: the checkpoint's by default.

    Raises:
        ArtifactError: no such folder, a model of another kind, or weights that are missing or of another shape; names
            them.
        ConfigError: the config holds settings that cannot be.
    """
    from interp.testbed.nano_model import NanoConfig, NanoForCausalLM

    config = NanoConfig(**_settings(Path(folder)))
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        model, report = NanoForCausalLM.from_pretrained(
            str(folder), config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, RuntimeError, ValueError) as err:
        raise ArtifactError(f"cannot load {folder}: {str(err).splitlines()[0]}; save the model again") from err
    faults = {
        kind: sorted(str(name) for name in report.get(f"{kind}_keys", ()))
        for kind in ("missing", "mismatched", "unexpected")
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise ArtifactError(f"the weights in {folder} are not those of its config ({listed}); save the model again")
    return model.eval()


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ArtifactError(
            f"{path} cannot be read ({type(err).__name__}); give a folder that a nano model's save_pretrained wrote"
        ) from err
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != "interp_nano":
        raise ArtifactError(f"{folder} holds a model of type {kind!r}, not 'interp_nano'; use HookManager.load")
    return found
