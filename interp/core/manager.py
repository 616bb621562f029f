"""`HookManager`: wraps a pretrained language model and reads or edits any activation in it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from interp.core.attention import install_tap
from interp.core.checks import check_positions, check_residual, refuse_split
from interp.core.errors import DataError, ModelError
from interp.core.generate import Generation, generate_pass
from interp.core.inputs import Inputs, check_tokens, read_inputs
from interp.core.intervention import Intervention
from interp.core.loading import load_model, skeleton, to_device
from interp.core.modelmap import ModelMap
from interp.core.passes import Caller, hooked_pass, run_pass
from interp.core.plan import Plan
from interp.core.points import Atlas
from interp.core.run import Run
from interp.core.site import Site
from interp.core.sitetable import SiteTable
from interp.core.text import Chat, Tokens, chat_tokens, single_token, special_mask, str_tokens

if TYPE_CHECKING:
    from interp.core.weights import Weights

__all__ = ["HookManager", "sites_of"]

_USUALLY_BOS = ("gpt2", "gpt_neox", "gpt_neo", "gptj")


class HookManager:
    """Wraps an unmodified model; every other part of `interp` works through one of these.

    Make one with `HookManager.load`. Activations are those of the model as Hugging Face wrote it: no norm is folded,
    no weight centred, unless `folded()` is asked for. Loading changes nothing of the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        modelmap: ModelMap,
        *,
        name: str = "",
        revision: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.root: nn.Module = _base_of(model)
        self.tokenizer = tokenizer
        self.map = modelmap
        self.name = name
        self.revision = revision
        self.notes = tuple(notes)
        self.atlas = Atlas(self.root, modelmap)
        self.caller = Caller(model)
        self.embedding: nn.Module = modelmap.module(self.root, "embed") or self.root
        self.is_folded = False  # set by `folded`
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._packing_checked = False
        self._residual_checked = False

    @classmethod
    def load(
        cls,
        source: "str | Path | nn.Module",
        tokenizer: Any = None,
        *,
        map: ModelMap | None = None,
        revision: str | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        device_map: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> "HookManager":
        """Load a causal LM and wrap it.

        Args:
            source: a model name, a Hugging Face folder, or a model in memory (which is left as it is). "testbed" and
                "testbed-llama" come with the library; a folder of such a name is "./testbed".
            tokenizer: for a model in memory; by name, the model's own is loaded.
            map: where the parts of the model are, for a module that TransformerLens has no adapter for and that has no
                method `interp_map()` to say so itself.
            revision: branch, tag or commit.
            dtype: the checkpoint's by default.
            device, device_map: as in transformers; the CPU by default.
            model_kwargs: further arguments of `from_pretrained`, such as {"attn_implementation": "eager"}, or under
                torchrun {"tp_plan": "auto"}, which splits each weight among the processes.
            trust_remote_code: run code that comes with the model; off unless you have read it.

        Raises:
            ModelError: it cannot be loaded or hooked; the message says what to do.
        """
        loaded = load_model(
            source,
            tokenizer,
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            model_kwargs=model_kwargs,
            trust_remote_code=trust_remote_code,
        )
        _refuse_unhookable(loaded.model)
        install_tap()
        root = _base_of(loaded.model)
        modelmap = map or _map_of(root)
        modelmap.check(root)
        return cls(loaded.model, loaded.tokenizer, modelmap, name=loaded.name, revision=loaded.revision)

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The model's (text) config."""
        config: Any = getattr(self.root, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.map.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.map.d_model

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return self.map.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads per layer; fewer than `n_heads` under grouped-query attention."""
        return self.map.n_kv_heads

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.map.d_head

    @property
    def d_mlp(self) -> int | None:
        """Neurons per MLP; None for a mixture of experts."""
        return self.map.d_mlp

    @property
    def d_vocab(self) -> int:
        """Entries of the vocabulary."""
        return self.map.d_vocab

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding, or where accelerate runs it if it is offloaded."""
        device = next(self.embedding.parameters()).device
        if device.type == "meta":
            execution = getattr(getattr(self.embedding, "_hf_hook", None), "execution_device", None)
            return device if execution is None else torch.device(execution)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the token embedding."""
        return next(self.embedding.parameters()).dtype

    @cached_property
    def weights(self) -> "Weights":
        """Weights per head in TransformerLens' layout, as views."""
        from interp.core.weights import Weights

        return Weights(self.root, self.atlas)

    def sites(self, pattern: str = "*") -> SiteTable:
        """Return the sites of this model that match a glob, with shapes and definitions."""
        return SiteTable.of(self.atlas, pattern)

    def __repr__(self) -> str:
        m = self.map
        return (
            f"HookManager({self.name!r}: {m.family}, {m.n_layers} layers, d_model {m.d_model}, {m.n_heads} heads"
            f"{'' if m.n_heads == m.n_kv_heads else f' / {m.n_kv_heads} kv'}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # -- tokens -------------------------------------------------------------------------------------------------

    def to_tokens(self, inputs: Inputs, *, bos: bool | None = None, mask: Any = None) -> Tokens:
        """Return token ids with their padding known.

        Args:
            inputs: text, a list of texts, a LongTensor [batch pos] or [pos], a list of lists of ids, or `Tokens`.
            bos: for text: None follows the tokenizer's habit, True puts BOS first, False leaves special tokens out.
            mask: for a tensor: True (or 1) where a token is real; needed when it is padded.

        Raises:
            DataError: nothing to run, ids outside the vocabulary, or a mask that does not fit.
        """
        tokens = read_inputs(self.tokenizer, inputs, bos=bos, mask=mask)
        check_tokens(tokens, rows=self._embedding_rows, longest=self.max_positions)
        return tokens

    @cached_property
    def _embedding_rows(self) -> int:
        """Rows of the embedding: ids must lie below (it can be larger than the vocabulary)."""
        weight = getattr(self.embedding, "weight", None)
        return int(weight.shape[0]) if isinstance(weight, Tensor) else self.d_vocab

    @cached_property
    def max_positions(self) -> int | None:
        """Positions that the model has learnt; None where it has no table of them."""
        limit = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        return int(limit) if limit and self.map.has("pos_embed") else None

    def to_str_tokens(self, inputs: Inputs) -> Any:
        """Return the text of each token: a list for one string or row, a list of lists otherwise."""
        tokens = read_inputs(self.tokenizer, inputs, bos=None, mask=None)
        check_tokens(tokens, rows=self._embedding_rows, longest=None)  # nothing is run, however many there are
        rows = str_tokens(self.tokenizer, tokens.ids)
        single = isinstance(inputs, str) or (isinstance(inputs, Tensor) and inputs.ndim == 1)
        return rows[0] if single else rows

    def to_single_token(self, text: str) -> int:
        """Return the id of a string that is exactly one token.

        Raises:
            DataError: it is several tokens (they are shown), or none.
        """
        return single_token(self.tokenizer, text)

    def special_mask(self, ids: Int[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
        """Return True where a token is special (BOS, EOS, pad, …); fits and statistics leave those out."""
        return special_mask(self.tokenizer, ids)

    def chat(self, messages: Any, *, add_generation_prompt: bool = True) -> Chat:
        """Return a conversation in the model's chat template, without a second BOS, with one named span per role."""
        return chat_tokens(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)

    def notes_for(self, tokens: Tokens) -> list[str]:
        """What a reader of the results should know about these tokens."""
        notes, length = list(self.notes), tokens.ids.shape[1]
        trained = getattr(self.config, "max_position_embeddings", None)
        if trained and length > trained:
            notes.append(f"{length} positions, but this model was made for {trained}; what it says beyond is its guess")
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if self.map.family in _USUALLY_BOS and bos is not None and not tokens.bos and tokens.ids.device.type == "cpu":
            first = tokens.ids.gather(1, tokens.mask.int().argmax(1, keepdim=True))
            if not bool((first == bos).all()):
                habit = f"no BOS: {self.map.family}'s tokenizer adds none, while the field's tools usually do"
                notes.append(f"{habit}; to_tokens(…, bos=True)")
        return notes

    # -- runs ---------------------------------------------------------------------------------------------------

    def run(
        self,
        inputs: Inputs,
        *,
        read: "Sequence[Site | str] | Site | str" = (),
        write: "Sequence[Intervention | tuple[str, Callable[[Tensor], Tensor]]] | Intervention" = (),
        grad: Callable[[Run], Tensor] | None = None,
        logits: str | None = None,
        to: "str | torch.device | None" = None,
        mask: Any = None,
        batch_size: int | None = None,
    ) -> Run:
        """Run one batch: all edits of a site in list order, then its reads.

        The forward stops after the last thing asked for, and computes no logits that nobody asked for. Without edits,
        logits are bit-equal to `model(ids, use_cache=False)`. Memory: the reads, plus the model's own forward.

        Args:
            inputs: text, texts, a LongTensor [batch pos], lists of ids, or `Tokens`.
            read: sites, names or globs; `Site("3.z").at(pos=-1, head=1)` is sliced inside the hook.
            write: edits such as `interp.Add(…)`, or pairs (site, function).
            grad: a function of the run that returns a metric [batch] or a scalar; its gradients at every read are in
                `out.grad`.
            logits: "all", "last" (each row's last real token) or "none". By default "none" when something is read
                without a metric, else "all".
            to: where reads and logits go, such as "cpu".
            mask: for a padded tensor: 1 where a token is real.
            batch_size: rows per forward; by default the whole batch, halved on running out of memory.

        Raises:
            InterpError: of the kind that fits; nothing was run, no hook is left.
        """
        self._refuse_training("run")
        tokens = self.to_tokens(inputs, mask=mask)
        plan = self._plan(read, write)
        if logits not in (None, "all", "last", "none"):
            raise DataError(f"logits={logits!r}: expected 'all', 'last' or 'none'")
        if logits == "none" and not plan.reads:
            raise DataError("logits='none' and nothing to read: this run would give nothing; add read=[…]")
        if grad is not None and not callable(grad):
            raise DataError(f"grad=… takes a function of the run that returns a metric, got {type(grad).__name__}")
        chosen = logits or ("none" if plan.reads and grad is None else "all")
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise DataError(f"batch_size={batch_size!r}: expected a whole number of rows ≥ 1")
        if grad is not None and not plan.reads:
            raise DataError("grad=… gives gradients at the sites read; add read=[…]")
        if tokens.position_ids is not None:
            self._packing_checked |= check_positions(self, tokens, tokens.position_ids, checked=self._packing_checked)
        return run_pass(
            self,
            tokens,
            plan,
            grad=grad,
            logits=chosen,
            to=None if to is None else to_device(to),
            batch_size=batch_size,
        )

    def batches(
        self,
        inputs: Iterable[Inputs],
        *,
        read: "Sequence[Site | str] | Site | str" = (),
        write: "Sequence[Intervention] | Intervention" = (),
        logits: str | None = None,
        to: "str | torch.device | None" = None,
        batch_size: int | None = None,
    ) -> Iterator[Run]:
        """Run many batches with the same reads and edits; yields one `Run` for each. Arguments as for `run`."""
        for batch in inputs:
            yield self.run(batch, read=read, write=write, logits=logits, to=to, batch_size=batch_size)

    def hooked(
        self,
        *,
        read: "Sequence[Site | str] | Site | str" = (),
        write: "Sequence[Intervention] | Intervention" = (),
    ) -> AbstractContextManager[Run]:
        """Attach reads and edits to whatever you do with `hm.model` yourself, training included.

        The run that the block gets holds the reads of the latest forward. With gradients on, they are on the autograd
        graph, and whole sites (not slices) can be differentiated by; a layer whose pattern or scores are read then
        runs our own attention formula.

        Args:
            read, write: as for `run`.
        """
        return hooked_pass(self, self._plan(read, write))

    def generate(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int = 20,
        read: "Sequence[Site | str] | Site | str" = (),
        write: "Sequence[Intervention] | Intervention" = (),
        temperature: float = 0.0,
        seed: int = 0,
        use_cache: bool = True,
        generation_kwargs: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Generate with the model's own `generate`, reading and editing every step, in one pass.

        Positions are absolute: an edit acts on the same tokens with and without the KV cache. Reads are stacked to
        [batch, prompt + new − 1, …]: the last token made was never an input, so it has no activation.

        Args:
            inputs: as for `run`; padded on the left by us where rows differ in length.
            max_new_tokens: at most so many per row; rows end at EOS.
            read, write: as for `run`; reads may be sliced by head but not by position.
            temperature: 0 is greedy; otherwise softmax(logits / temperature) is sampled.
            seed: for sampling.
            use_cache: the KV cache; without it every step runs the whole sequence.
            generation_kwargs: further arguments of transformers' `generate`; no beams, no assistant.

        Raises:
            InterpError: of the kind that fits.
        """
        self._refuse_training("generate")
        tokens = self.to_tokens(inputs)
        plan = self._plan(read, write)
        return generate_pass(
            self,
            tokens,
            plan,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            use_cache=use_cache,
            generation_kwargs=dict(generation_kwargs or {}),
        )

    def _plan(self, read: Any, write: Any) -> Plan:
        key = tuple(read) if isinstance(read, list | tuple) else (read,)
        plain = not write and all(isinstance(r, str) for r in key)
        if plain and key in self._plans:
            return self._plans[key]
        plan = Plan.make(self.atlas, read, write)
        refuse_split(self.model, plan)
        if not self._residual_checked and not self.model.training and plan.needs_residual_identity:
            self._residual_checked = True
            try:
                check_residual(self)
            except BaseException:
                self._residual_checked = False
                raise
        if plain:
            if len(self._plans) > 256:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _refuse_training(self, verb: str) -> None:
        if self.model.training:
            raise ModelError(
                f"the model is in train mode, where dropout changes activations; call hm.model.eval() "
                f"before {verb}, or use hm.hooked(…)"
            )

    # -- other forms --------------------------------------------------------------------------------------------

    def folded(self) -> "HookManager":
        """Return a manager over a copy with norms folded and weights centred (TransformerLens' default).

        What was done is in the copy's `notes`, and in those of its runs; see `interp.core.fold.fold`.

        Raises:
            ModelError: the family's norms cannot be folded.
        """
        from interp.core.fold import fold

        twin, notes = fold(self.root, self.atlas)
        name = f"{self.name} (folded)"
        made = HookManager(twin, self.tokenizer, self.map, name=name, revision=self.revision, notes=notes)
        made.is_folded = True
        return made

    def to_transformer_lens(self) -> Any:
        """Return a `TransformerBridge` over this model's own tensors; the model itself stays as it is.

        Raises:
            ModelError: TransformerLens has no adapter for the architecture.
        """
        from interp.core.bridge import to_transformer_lens

        return to_transformer_lens(self.root, self.tokenizer)


def sites_of(
    name: str, *, pattern: str = "*", revision: str | None = None, trust_remote_code: bool = False
) -> SiteTable:
    """Return the sites of a model from its config alone, without weights.

    Args:
        name: a model name or a folder with a config.json.
        pattern: a glob over site names.
        revision, trust_remote_code: as for `HookManager.load`.

    Raises:
        ModelError: no config, or an architecture without a map.
    """
    model = skeleton(name, revision=revision, trust_remote_code=trust_remote_code)
    modelmap = _map_of(model)
    return SiteTable.of(Atlas(model, modelmap), pattern)


def _base_of(model: Any) -> nn.Module:
    """The model itself, or the one that a peft wrapper holds."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _map_of(model: nn.Module) -> ModelMap:
    own = getattr(model, "interp_map", None)  # a module that brings its map
    if callable(own):
        return own()
    from interp.core.bridge import map_of

    if not hasattr(model, "config"):
        raise ModelError(f"{type(model).__name__} is no Hugging Face model; give load(module, map=interp.ModelMap(…))")
    return map_of(model)


def _refuse_unhookable(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"load takes a model name, a folder or a model, got {type(model).__name__}")

    def compiles(module: nn.Module) -> bool:
        in_place = getattr(module, "_compiled_call_impl", None) is not None
        return type(module).__name__ == "OptimizedModule" or in_place

    compiled = any(compiles(module) for module in model.modules())
    if compiled:
        raise ModelError(
            "a compiled model's inner hooks would not fire; give the model before torch.compile (model._orig_mod)"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(f"{type(model).__name__} runs copies of the model; give the model inside it (model.module)")
