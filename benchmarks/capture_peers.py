"""What is captured in `capture.py`, and by whom; also the worker that it starts for each contender.

`python capture_peers.py CONTENDER` says what it runs on, or null where this python lacks it. Then a line on stdin,
{"setting": …, "folder": …}, is answered by one on stdout: the CPU and wall seconds of one pass over the text, and the
first time also the mean square of what it gave, by which its values are checked.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import engine  # sets the number of threads, so before torch
from engine import REPO, SEED, Call, clocked

QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True)
class Setting:
    """A model and its text, of rows that are ids already.

    Args:
        model: "gpt2" or "llama", random of these sizes; or "testbed".
        n_layers, d_model, d_vocab: sizes of it.
        ctx: tokens per row.
        rows: rows per forward.
        blocks: forwards that the text takes.
        dtype, device: of the model.
    """

    model: str
    n_layers: int
    d_model: int
    d_vocab: int
    ctx: int
    rows: int
    blocks: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def layer(self) -> int:
        """The block at mid-depth whose output is captured."""
        return self.n_layers // 2 - 1

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return self.blocks * self.rows * self.ctx

    @property
    def site(self) -> str:
        """TransformerLens' name of what is captured."""
        return f"blocks.{self.layer}.hook_resid_post"


@dataclass(frozen=True)
class Contender:
    """One way to capture.

    Args:
        call: one pass over the text; what it returns is kept until the time is taken.
        mean_square: of all that was captured, over tokens and features; not timed.
        clean: called after each pass, not timed.
    """

    call: Call
    mean_square: Callable[[], float]
    clean: Callable[[], None] = lambda: None


def build(setting: Setting) -> tuple[Any, Any]:
    """The model of a setting, and its ids [row pos] on the CPU; the same in every process."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    ids = torch.randint(10, setting.d_vocab, (setting.blocks * setting.rows, setting.ctx))
    if setting.model == "testbed":
        model = transformers.AutoModelForCausalLM.from_pretrained(REPO / "data" / "testbed")
    else:
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        with torch.device(setting.device):
            model = _random(setting, special, transformers)
    model = model.to(setting.device, getattr(torch, setting.dtype)).eval().requires_grad_(False)
    return model, ids


def _random(setting: Setting, special: dict[str, int], transformers: Any) -> Any:
    d, heads, special = setting.d_model, max(1, setting.d_model // 64), {**special, "vocab_size": setting.d_vocab}
    if setting.model == "gpt2":
        sizes = {"n_layer": setting.n_layers, "n_head": heads, "n_embd": d, "n_positions": setting.ctx}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special))
    sizes = {"num_hidden_layers": setting.n_layers, "hidden_size": d, "intermediate_size": 4 * d}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}
    config = transformers.LlamaConfig(**sizes, **special, max_position_embeddings=setting.ctx)
    return transformers.LlamaForCausalLM(config)


def twin_of(model: Any) -> Any:
    """A copy that shares its tensors."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def word_tokenizer(d_vocab: int) -> Any:
    """A tokenizer that nobody lets tokenize."""
    import transformers
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(d_vocab)}, unk_token="w0"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def keeping(setting: Setting, ids: Any, read: Callable[[Any], Any]) -> Contender:
    """A loop over the text that keeps what a function of a batch's ids gives: [row pos d]."""

    def call() -> Any:
        return [read(batch.to(setting.device)) for batch in ids.split(setting.rows)]

    return Contender(call, lambda: mean_square(call()))


def mean_square(parts: Any) -> float:
    """The mean square of all numbers of some tensors."""
    total, count = 0.0, 0
    for part in parts:
        total += float(part.detach().double().pow(2).sum())
        count += part.numel()
    return total / count


def timed(contender: Contender, device: str) -> tuple[float, float]:
    """CPU and wall seconds of one pass, until the device is done."""
    import torch

    with torch.no_grad():
        cpu, wall, held = clocked(contender.call, device)
    del held
    contender.clean()
    return cpu, wall


def floor(setting: Setting, model: Any, ids: Any, folder: Path) -> Contender:
    """The backbone alone, cut after the block."""
    backbone = cut(model, setting.layer)
    return keeping(setting, ids, lambda batch: backbone(batch, use_cache=False).last_hidden_state)


def cut(model: Any, layer: int) -> Any:
    """A backbone that ends after a block, over the same weights."""
    import torch

    backbone = twin_of(model).base_model
    blocks, norm = ("h", "ln_f") if hasattr(backbone, "h") else ("layers", "norm")
    setattr(backbone, blocks, getattr(backbone, blocks)[: layer + 1])
    setattr(backbone, norm, torch.nn.Identity())
    backbone.config.num_hidden_layers = layer + 1
    return backbone


def flops(setting: Setting) -> float:
    """Floating-point operations per token of the blocks that must run: their matrices, and half of the attention."""
    model, _ = build(replace(setting, blocks=1, rows=1, device="cpu") if setting.model == "testbed" else setting)
    backbone = cut(model, setting.layer)
    blocks = backbone.h if hasattr(backbone, "h") else backbone.layers
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    return float(2 * matrices + 2 * setting.ctx * setting.d_model * (setting.layer + 1))


def stored_bytes(setting: Setting) -> int:
    """Bytes of a token in a store: activations in bfloat16, and four columns."""
    return 2 * setting.d_model + 17


def write_raw(path: Path, data: Any, times: int) -> None:
    """Write some bytes to a file, several times over, and wait for the disk."""
    with path.open("wb") as file:
        for _ in range(times):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


# -- ours -----------------------------------------------------------------------------------------------------------


def our_text(setting: Setting, ids: Any) -> Any:
    """The ids as a `TokenSource` that has tokenised them already; packing is left to it."""
    from interp.data.tokens import TokenSource

    class Tokenised(TokenSource):
        def _tokenized(self, documents: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[int]]]:
            for index, _ in documents:
                yield index, rows[index]

    rows, words = ids.tolist(), word_tokenizer(setting.d_vocab)
    return Tokenised([f"{i}" for i in range(len(rows))], words, ctx=setting.ctx, rows=setting.rows, bos=False)


def to_memory(setting: Setting, model: Any, ids: Any, folder: Path) -> Contender:
    """One round of a buffer that holds the whole text: filled, and its half served."""
    import torch

    from interp import HookManager
    from interp.data.store import ActivationStore

    hm, text, size = HookManager.load(twin_of(model)), our_text(setting, ids), batch_size(setting)
    sizes: dict[str, Any] = {"batch_size": size, "buffer_tokens": setting.tokens}

    def stream() -> Any:
        dtype = getattr(torch, setting.dtype)
        return ActivationStore.stream(hm, text, setting.site, **sizes, dtype=dtype).batches()

    def call() -> Any:
        batches = stream()
        for _ in range(setting.tokens // 2 // size):
            next(batches)
        return batches

    return Contender(call, lambda: mean_square(batch.x for batch in stream()))


def to_disk(setting: Setting, model: Any, ids: Any, folder: Path, dtype: Any = "bfloat16") -> Contender:
    """`interp.capture`."""
    from interp import HookManager
    from interp.data.capture import CaptureOptions, capture
    from interp.data.store import ActivationStore

    hm, text, place = HookManager.load(twin_of(model)), our_text(setting, ids), folder / f"ours-{dtype}"

    def call() -> Any:
        return capture(hm, text, setting.site, place, CaptureOptions(dtype=dtype), progress=False)

    def clean() -> None:
        shutil.rmtree(place, ignore_errors=True)

    def check() -> float:
        call()
        rows = ActivationStore.open(place, batch_size=1024, buffer_tokens=2048).sequential()
        found = mean_square(part.values[0] for part in rows)
        clean()
        return found

    return Contender(call, check, clean)


def raw_disk(setting: Setting, model: Any, ids: Any, folder: Path) -> Contender:
    """As many bytes as a store of the text has, from memory to a file and to the disk itself."""
    data, path = os.urandom(setting.rows * setting.ctx * stored_bytes(setting)), folder / "raw"

    def call() -> Any:
        write_raw(path, data, setting.blocks)

    return Contender(call, lambda: math.nan, lambda: path.unlink(missing_ok=True))


# -- peers ----------------------------------------------------------------------------------------------------------


def bridge(setting: Setting, model: Any, ids: Any, folder: Path) -> Contender:
    """`TransformerBridge.run_with_cache`, stopping after the block."""
    from interp.core.bridge import to_transformer_lens

    lens, name = to_transformer_lens(model, None), setting.site
    where = {"names_filter": [name], "stop_at_layer": setting.layer + 1}
    return keeping(setting, ids, lambda batch: lens.run_with_cache(batch, **where)[1][name])


def nnsight(setting: Setting, model: Any, ids: Any, folder: Path) -> Contender:
    """A trace that saves the block's output and stops."""
    from nnsight import NNsight

    lm = NNsight(twin_of(model))
    block = (lm.transformer.h if setting.model != "llama" else lm.model.layers)[setting.layer]

    def read(batch: Any) -> Any:
        with lm.trace(batch) as tracer:
            kept = block.output.save()
            tracer.stop()
        return kept[0] if isinstance(kept, tuple) else kept

    return keeping(setting, ids, read)


def interp_engine(setting: Setting, model: Any, ids: Any, folder: Path) -> Contender:
    """interp-engine's eager backend, which cannot stop."""
    from interp_engine import Address, capture
    from interp_engine.model import EagerModel

    name, words = "gpt2" if setting.model != "llama" else "meta-llama/Llama-3.2-1B", word_tokenizer(setting.d_vocab)
    eager, point = EagerModel(name, hf_model=twin_of(model), tokenizer=words), Address("resid_post", setting.layer)
    return keeping(setting, ids, lambda batch: capture(eager, batch, [point])[point])


def hooked_transformer(model: Any) -> Any:
    """A GPT-2 as `HookedTransformer`, as `from_pretrained_no_processing` makes it, without the hub."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    hf, off = model.config, ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    sizes = {"n_layers": hf.n_layer, "d_model": hf.n_embd, "n_ctx": hf.n_positions, "n_heads": hf.n_head}
    sizes |= {"d_head": hf.n_embd // hf.n_head, "d_mlp": 4 * hf.n_embd, "d_vocab": hf.vocab_size}
    kind = {"act_fn": hf.activation_function, "eps": hf.layer_norm_epsilon, "normalization_type": "LN"}
    cfg = HookedTransformerConfig(**sizes, **kind, dtype=model.dtype, device=str(model.device))
    made = HookedTransformer(cfg)
    made.load_and_process_state_dict(convert_gpt2_weights(model, cfg), **dict.fromkeys(off, False))
    return made.eval().requires_grad_(False)


def saelens_model(setting: Setting, model: Any, kind: str) -> tuple[Any, str]:
    """A model as SAELens wraps it, "HookedTransformer" (its default) or "AutoModelForCausalLM"; and its hook's name."""
    from sae_lens.load_model import HookedProxyLM

    if kind == "HookedTransformer":
        if setting.model == "llama":
            raise ValueError("without the hub only GPT-2 is converted to HookedTransformer here")
        return hooked_transformer(model), setting.site
    name = f"{'transformer.h' if setting.model != 'llama' else 'model.layers'}.{setting.layer}"
    return HookedProxyLM(twin_of(model), word_tokenizer(setting.d_vocab)), name


def saelens_store(setting: Setting, model: Any, ids: Any, folder: Path, kind: str = "HookedTransformer") -> Contender:
    """SAELens' `ActivationsStore`: the first round of a buffer that holds the whole text."""
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    (wrapped, name), text = saelens_model(setting, model, kind), Dataset.from_dict({"input_ids": ids.tolist()})
    size = batch_size(setting)
    where = {"hook_name": name, "hook_head_index": None, "d_in": setting.d_model, "context_size": setting.ctx}
    sizes = {"store_batch_size_prompts": setting.rows, "train_batch_size_tokens": size}
    sizes |= {"n_batches_in_buffer": len(ids), "total_training_tokens": len(ids)}  # its buffers are counted in rows
    how = {"streaming": False, "prepend_bos": False, "normalize_activations": "none"}

    def call() -> Any:
        options = {**where, **sizes, **how, "device": setting.device, "dtype": setting.dtype}
        batches = ActivationsStore(wrapped, text, **options).get_data_loader()
        for _ in range(setting.tokens // 2 // size):
            last = next(batches)
        return batches, last

    return Contender(call, lambda: mean_square(call()[1:]))


def saelens_runner(setting: Setting, model: Any, ids: Any, folder: Path, kind: str = "HookedTransformer") -> Contender:
    """SAELens' `CacheActivationsRunner.run`, in float32; the model is loaded before."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, cache_activations_runner

    (wrapped, name), text = saelens_model(setting, model, kind), Dataset.from_dict({"input_ids": ids.tolist()})
    place = folder / f"saelens-{kind}"
    where = {"hook_name": name, "d_in": setting.d_model, "context_size": setting.ctx, "device": setting.device}
    size = setting.tokens * setting.d_model * 4.001 / 1e9  # its only buffer holds whole forwards: all of them
    sizes = {"model_batch_size": setting.rows, "training_tokens": setting.tokens, "buffer_size_gb": size}
    how = {"dataset_path": "", "model_name": "", "shuffle": False, "dtype": "float32", "prepend_bos": False}
    cfg = CacheActivationsRunnerConfig(**where, **sizes, **how, new_cached_activations_path=str(place))

    def call() -> Any:
        cache_activations_runner.load_model = lambda **_: wrapped
        return CacheActivationsRunner(cfg, override_dataset=text).run()

    def clean() -> None:
        shutil.rmtree(place, ignore_errors=True)

    def check() -> float:
        found = mean_square([call().with_format("torch")[name][:]])
        clean()
        return found

    return Contender(call, check, clean)


def batch_size(setting: Setting) -> int:
    """Tokens that a buffer serves at once."""
    return min(4096, setting.tokens // 4)


OURS: dict[str, Callable[..., Contender]] = {
    "floor": floor,
    "again": floor,
    "raw_disk": raw_disk,
    "memory": to_memory,
    "disk": to_disk,
    "disk_float32": partial(to_disk, dtype="float32"),
}
PEERS: dict[str, Callable[..., Contender]] = {
    "bridge": bridge,
    "saelens_store": saelens_store,
    "saelens_store_hf": partial(saelens_store, kind="AutoModelForCausalLM"),
    "saelens_runner": saelens_runner,
    "saelens_runner_hf": partial(saelens_runner, kind="AutoModelForCausalLM"),
    "nnsight": nnsight,
    "interp_engine": interp_engine,
}
DISTRIBUTIONS = {"bridge": "transformer-lens", "nnsight": "nnsight", "interp_engine": "interp-engine"}
DISTRIBUTIONS |= {peer: "sae-lens" for peer in PEERS if peer.startswith("saelens")}


def work(contender: str) -> None:
    """The worker's loop: one pass per line."""
    say = engine.answering()
    warnings.filterwarnings("ignore")
    say(version(contender))
    now: tuple[Setting, Contender] | None = None
    for line in sys.stdin:
        asked, answer = json.loads(line), {}
        setting = Setting(**asked["setting"])
        try:
            if now is None or now[0] != setting:
                now = None
                now = setting, {**OURS, **PEERS}[contender](setting, *build(setting), Path(asked["folder"]))
                answer["mean_square"] = checked(now[1])
            cpu, wall = timed(now[1], setting.device)
            say({**answer, "cpu": cpu, "wall": wall})
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its result)
            say({"error": f"{type(error).__name__}: {str(error)[:200]}"})


def checked(contender: Contender) -> float:
    """What a contender's values come to; the pass also warms it up."""
    import torch

    with torch.no_grad():
        return contender.mean_square()


def version(contender: str) -> str | None:
    """The version of what a contender runs on; None where this python does not have it."""
    held = next(iter(metadata.distributions(name=DISTRIBUTIONS.get(contender, "torch"))), None)
    return None if held is None else str(held.version)


class Worker(engine.Worker):
    """A contender in a process of its own: what one leaves in memory is nobody else's luck.

    Its own luck it keeps: malloc maps and clears large tensors anew, or not, as the process's past has it. Two
    processes that do the same were up to a fifth apart, so each gets a new one from time to time.
    """

    def __init__(self, python: str, contender: str) -> None:
        command, pipe = [python, __file__, contender], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **QUIET})
        self.version: str | None = self._answer()
        self.python, self.contender = python, contender

    def anew(self) -> "Worker":
        """The same in a new process, when this one has ended."""
        self.close()
        return Worker(self.python, self.contender)

    def ask(self, setting: Setting, folder: Path) -> dict[str, Any]:
        """One pass, or why there was none."""
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return {"error": "its worker has ended"}
        self.process.stdin.write(json.dumps({"setting": asdict(setting), "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = self._answer()
        return found


def workers_for(contenders: set[str], pythons: list[str]) -> dict[str, Worker]:
    """A worker for each contender that is here, of the first python that has it; ours run in this one."""
    found = {}
    for contender in sorted(contenders):
        for python in pythons if contender in PEERS else [sys.executable]:
            worker = Worker(python, contender)
            if worker.version is not None:
                found[contender] = worker
                break
            worker.close()
    return found


if __name__ == "__main__":
    work(sys.argv[1])
