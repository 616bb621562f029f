"""A model whose weights transformers has split among two processes: what is captured, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import interp
from interp.cli.main import main as command
from interp.core.disk import weights_digest
from interp.data.store import ActivationStore
from tests.model.tensor_parallel import line
from tests.source import REPO


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, vocab_size=2048, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    interp.HookManager.load("testbed").tokenizer.save_pretrained(folder)
    return str(folder)


def test_two_processes_that_hold_one_model_capture_what_one_does(llama: str, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    sentence = "the cat sat on the mat and looked at the dog . "
    text.write_text("".join(json.dumps({"text": sentence * (2 + i % 3)}) + "\n" for i in range(24)))
    script = str(Path(__file__).parent / "tensor_parallel.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    words = [*run, llama, str(text), str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]

    hm = interp.HookManager.load(llama)
    assert command(line(llama, str(text), str(tmp_path / "one"))) == 0
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text().split() == ["0", "3", weights_digest(hm.model)]
    stores = [ActivationStore.open(tmp_path / name, batch_size=64, buffer_tokens=128) for name in ("one", "store")]
    assert [store.manifest.processes for store in stores] == [1, 2]
    whole, split = (store.rows(slice(None)) for store in stores)
    assert len(whole) > 500 and torch.equal(whole.tokens, split.tokens)
    for ours, theirs in zip(split.values, whole.values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Its last bits are other ones, so one process alone may not go on with it.
    assert command([*line(llama, str(text), str(tmp_path / "store")), "--resume"]) == 1
