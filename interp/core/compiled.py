"""A model's blocks compiled by torch, for forwards of one shape; the rest of it, and its hooks, stay as they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from interp.core.errors import ConfigError, ModelError
from interp.core.site import Site

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["COMPILE_MODES", "CompileMode", "CompiledBlocks"]

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
COMPILE_MODES: tuple[str, ...] = get_args(CompileMode)
"""What `torch.compile` calls its modes; "reduce-overhead" and "max-autotune" replay CUDA graphs on a GPU."""


class CompiledBlocks:
    """The blocks inside which nothing is read, compiled; used only while `active`.

    A block that holds a site of its own (a head's output, an MLP's neurons) runs as it is, for a hook inside compiled
    code would be compiled with it. What comes out differs from the model's own forward by rounding. Every new shape is
    compiled anew, so only forwards of one shape should be run while active. With CUDA graphs what is read must be
    copied before the next forward.

    Args:
        hm: the manager of the model; the model itself is left as it is.
        sites: what will be read.
        mode: one of `COMPILE_MODES`.

    Attributes:
        layers: the blocks that are compiled.

    Raises:
        ConfigError: the mode is unknown, or there is no block to compile.
    """

    def __init__(self, hm: "HookManager", sites: Sequence[Site], mode: str = "default") -> None:
        if mode not in COMPILE_MODES:
            raise ConfigError(f"compile={mode!r}: expected one of {', '.join(COMPILE_MODES)}")
        modules = {layer: hm.map.module(hm.root, "block", layer) for layer in range(hm.n_layers)}
        blocks = {layer: block for layer, block in modules.items() if block is not None}
        inside = {id(hm.atlas.point(site).module) for site in sites}
        # The last block that runs before a forward stops.
        last = max(hm.n_layers - 1 if site.layer is None else site.layer for site in sites)
        self.layers = [layer for layer, block in blocks.items() if layer <= last and not inside & _below(block)]
        if not self.layers:
            raise ConfigError(
                f"compile={mode!r}: every block that must run holds one of {', '.join(s.name for s in sites)}, and "
                "what is read inside a block keeps it from being compiled; leave compile off"
            )
        self._calls = [(blocks[layer], self._compiled(blocks[layer], mode)) for layer in self.layers]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Have the blocks run as compiled; one thread at a time.

        Raises:
            ModelError: torch cannot compile them here; says why.
        """
        try:
            for block, call in self._calls:
                block.forward = call
            torch.compiler.cudagraph_mark_step_begin()
            yield
        finally:
            for block, _ in self._calls:
                del block.forward  # the class's own is found again

    def _compiled(self, block: nn.Module, mode: str) -> Callable[..., Any]:
        if "forward" in vars(block):
            raise ConfigError(
                f"compile={mode!r}: {type(block).__name__}'s forward is wrapped (accelerate moves its weights?); leave "
                "compile off, or load the model on one device"
            )
        compiled: Callable[..., Any] = torch.compile(block.forward, dynamic=False, mode=mode)

        def call(*args: Any, **kwargs: Any) -> Any:
            from torch._dynamo.exc import TorchDynamoException

            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as err:
                why = str(err).strip().splitlines()[0]
                raise ModelError(
                    f"torch.compile cannot compile {type(block).__name__} here: {why}. Leave compile off; on a CPU it "
                    "needs a C++ compiler, on a GPU Triton"
                ) from err

        return call


def _below(block: nn.Module) -> set[int]:
    """The modules inside a block, without the block itself: hooks on it are outside its forward."""
    return {id(module) for module in block.modules()} - {id(block)}
