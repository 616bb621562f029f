"""The loss behind a site on an accelerator: the CPU's numbers, the same bits twice."""

import pytest
import torch

from interp.core.manager import HookManager
from interp.data.tokens import TokenSource
from interp.train.common import deterministic
from interp.train.downstream import downstream_loss
from tests.families import make, word_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("packing", ["concat", "one_doc"])
def test_a_gpu_gives_the_loss_and_gradient_of_the_cpu(loss: str, packing: str) -> None:
    draw = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(1, 120, (9,), generator=draw).tolist()) for _ in range(12)]
    block = next(TokenSource(texts, word_tokenizer(), ctx=12, rows=6, bos=True, packing=packing).blocks())
    found = []
    for device in ("cpu", "cuda", "cuda"):
        hm = HookManager.load(make("Llama").to(device), word_tokenizer())
        x = hm.run(block.inputs, read="1.resid_post")["1.resid_post"][(block.mask & ~block.special).to(device)]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
        y = (x + noise).requires_grad_()
        with deterministic(True):
            value = downstream_loss(hm, block, "1.resid_post", y, loss=loss, rows=4)  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad(value, y)
        found.append((value.detach().cpu(), gradient.cpu()))
    (here, here_grad), (there, there_grad), (again, again_grad) = found
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(there_grad, here_grad, atol=1e-4, rtol=1e-2)
    assert torch.equal(there, again) and torch.equal(there_grad, again_grad)
