"""Steering on an accelerator says what it says on the CPU, and asks the device nothing on its way."""

from dataclasses import replace

import pytest
import torch

from interp.core.conditional import Gated, KeepNorm
from interp.core.direction import Direction, Dose, SiteScale
from interp.core.gate import Gate
from interp.core.generate import _sent
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.steering.acting.rowwise import rowwise

pytestmark = pytest.mark.gpu

SITES = ["1.resid_post", "2.resid_post"]
TEXTS = ["Because the lesson was brilliant, Stella felt", "Because the game was horrible, Peter felt"]


@pytest.fixture(scope="module", params=["testbed", "testbed-llama"])
def both(request: pytest.FixtureRequest) -> tuple[HookManager, HookManager]:
    """The same model on the CPU and on the accelerator."""
    return HookManager.load(request.param), HookManager.load(request.param, device="cuda")


def direction(hm: HookManager) -> Direction:
    draw = torch.Generator().manual_seed(0)
    made = Direction.of(hm, {s: torch.randn(hm.d_model, generator=draw) for s in SITES})
    return replace(made, scale=dict.fromkeys(SITES, SiteScale(rms=5.0, sigma=2.0)))


@pytest.mark.parametrize("operation", ["add", "ablate", "set"])
def test_logits_are_those_of_the_cpu(both: tuple[HookManager, HookManager], operation: str) -> None:
    d = direction(both[0])
    dose = 1.0 if operation == "ablate" else Dose(torch.tensor([1.0, -2.0]), "sigma")
    found = [hm.run(TEXTS, write=d.as_interventions(dose, operation=operation)).logits.cpu() for hm in both]
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=1e-3)


def test_gates_norms_and_rows_are_those_of_the_cpu(both: tuple[HookManager, HookManager]) -> None:
    d = direction(both[0])
    for once in ("prompt", "step"):
        gate = Gate("0.resid_post", d["1.resid_post"], once=once)
        late = Gate("2.resid_post", d["2.resid_post"])
        write: list[Intervention] = [KeepNorm(Gated(e, gate)) for e in d.as_interventions(Dose(1.0, "rms"))]
        write += [Gated(e, late) for e in rowwise([d, None], 2.0)]
        found = [hm.generate(TEXTS, max_new_tokens=8, write=write, read=SITES) for hm in both]
        assert torch.equal(found[0].tokens.cpu(), found[1].tokens.cpu())  # type: ignore[union-attr]
        torch.testing.assert_close(found[1][SITES[1]].cpu(), found[0][SITES[1]], atol=2e-3, rtol=1e-3)
        for g in (gate, late):
            assert torch.equal(found[1].gates[g].open.cpu(), found[0].gates[g].open)


def test_a_steered_step_does_not_wait_for_the_device(both: tuple[HookManager, HookManager]) -> None:
    d, hm = direction(both[0]), both[1]
    ids = hm.to_tokens(TEXTS[0]).ids.cuda()
    write = d.as_interventions(2.0, where=Where())
    on_device = [_sent(e, hm.device) for e in write]
    if _waits(hm, ids):
        pytest.skip("the model itself waits for the device in its forward")
    with hm.hooked(write=on_device):
        assert not _waits(hm, ids)


def _waits(hm: HookManager, ids: torch.Tensor) -> bool:
    """Whether a forward, once warm, asks the device for anything."""
    with torch.no_grad():
        hm.model(ids, use_cache=False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            hm.model(ids, use_cache=False)
        except RuntimeError as err:
            if "synchroniz" not in str(err):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False
