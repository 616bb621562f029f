"""SAELens' own reader on our datasets, and our reader on what SAELens' own runner has written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from interp.data.capture import CaptureOptions, capture
from interp.data.exchange import from_saelens_dataset, to_hf_dataset
from interp.data.stored import StoredActivations
from interp.data.tokens import TokenSource
from tests.families import manager, word_tokenizer

# SAELens imports modules that TransformerLens has moved, and asks for a class that it is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NAME, CTX, WIDTH = "blocks.1.hook_resid_post", 8, 32


def texts() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 30, (30,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(1, 120, (n,), generator=generator).tolist()) for n in sizes]


def their_store(path: Path, **options: Any) -> Any:
    from sae_lens.training.activations_store import ActivationsStore

    settings = {
        "model": None,
        "dataset": None,
        "streaming": False,
        "hook_name": NAME,
        "hook_head_index": None,
        "context_size": CTX,
        "d_in": WIDTH,
        "n_batches_in_buffer": 8,
        "total_training_tokens": 10**6,
        "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 16,
        "prepend_bos": False,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
        "cached_activations_path": str(path),
    }
    return ActivationsStore(**{**settings, **options})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("streamed", [True, False])
def test_sae_lens_reads_our_store_as_its_own_cache(tmp_path: Path, dtype: Any, streamed: bool) -> None:
    tokens = TokenSource(texts(), word_tokenizer(), ctx=CTX, rows=4, bos=True)
    sites, options = ["1.resid_post", "0.z"], CaptureOptions(dtype=dtype, unit_documents=9)
    capture(manager("Llama"), tokens, sites, tmp_path / "store", options, progress=False)
    store = StoredActivations(tmp_path / "store")
    if streamed:
        to_hf_dataset(store, folder=tmp_path / "hf")
    else:
        to_hf_dataset(store, site="1.resid_post").save_to_disk(tmp_path / "hf")
    theirs, ours = their_store(tmp_path / "hf"), to_hf_dataset(store).with_format("torch")
    for first in range(0, len(ours) - 3, 4):
        x, ids = theirs.get_raw_llm_batch()
        assert x.dtype == torch.float32
        assert torch.equal(x, ours[first : first + 4][NAME].float().flatten(0, 1))
        assert torch.equal(ids.long(), ours[first : first + 4]["token_ids"].flatten().long())
    # Every row that their mixing buffer serves is one of ours, and no special one when those are named.
    bos = word_tokenizer().bos_token_id
    theirs = their_store(tmp_path / "hf", exclude_special_tokens=torch.tensor([bos]))
    counted = store.rows(store.counted(0, store.n_rows)).values[0].float()
    mine = {tuple(row) for row in counted.tolist()}
    served = [tuple(row) for _ in range(6) for row in next(theirs).tolist()]
    assert len(served) == 96 and set(served) <= mine


@pytest.mark.filterwarnings("ignore:.*fewer samples:UserWarning", "ignore:To copy construct from a tensor:UserWarning")
def test_what_sae_lens_has_cached_becomes_a_store_with_the_models_own_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import sae_lens.cache_activations_runner as runner
    from sae_lens.config import CacheActivationsRunnerConfig
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2, d_model=WIDTH, n_ctx=CTX, d_head=8, n_heads=4, d_vocab=120, act_fn="relu", seed=0, device="cpu"
        )
    )
    monkeypatch.setattr(runner, "load_model", lambda **_: model)
    ids = torch.randint(1, 120, (24, CTX))
    ids[:, 0] = 0
    cfg = CacheActivationsRunnerConfig(
        dataset_path="none",
        model_name="none",
        model_batch_size=4,
        hook_name=NAME,
        d_in=WIDTH,
        training_tokens=24 * CTX,
        context_size=CTX,
        new_cached_activations_path=str(tmp_path / "cache"),
        shuffle=False,
        device="cpu",
        buffer_size_gb=12 * CTX * WIDTH * 4 / 1e9,
        streaming=False,
    )
    rows = datasets.Dataset.from_dict({"tokens": ids.tolist()})
    runner.CacheActivationsRunner(cfg, override_dataset=rows).run()
    back = from_saelens_dataset(tmp_path / "cache", tmp_path / "store", special_ids=[0], model="tiny", unit_bytes=4000)
    assert len(back.shards) > 3 and back.n_tokens == 24 * (CTX - 1)
    assert torch.equal(back.column("ids").view(24, CTX).long(), ids)
    with torch.no_grad():
        expected = model.run_with_cache(ids, names_filter=[NAME], prepend_bos=False)[1][NAME]
    for index in range(24):
        document = back.document(index)
        assert torch.equal(document.ids, ids[index, 1:]) and document.positions.tolist() == list(range(CTX - 1))
        torch.testing.assert_close(document.values[NAME], expected[index, 1:], rtol=0, atol=1e-5)
    # And back again: SAELens reads from ours what it had written.
    to_hf_dataset(back, folder=tmp_path / "again")
    x, tokens = their_store(tmp_path / "again", store_batch_size_prompts=24).get_raw_llm_batch()
    assert torch.equal(tokens.long().view(24, CTX), ids)
    torch.testing.assert_close(x.view(24, CTX, WIDTH), expected, rtol=0, atol=1e-5)
