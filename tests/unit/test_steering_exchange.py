"""Files of other tools: what is written comes back, blocks keep their numbers, and what is damaged is refused."""

import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.core.direction import Direction
from interp.core.errors import ArtifactError, InterpError, ModelError, ShapeError, SiteError
from interp.core.manager import HookManager
from interp.steering.acting.exchange import from_gguf, from_tensors, from_torch, to_gguf
from interp.steering.acting.gguf import read_gguf, write_gguf
from tests.families import manager

D = 32


@pytest.fixture(scope="module")
def hm() -> HookManager:
    return manager("Llama")  # three blocks


def direction(hm: HookManager, *sites: str, **more: Any) -> Direction:
    draw = torch.Generator().manual_seed(0)
    return Direction.of(
        hm, {s: torch.randn(D, generator=draw) for s in sites or ("1.resid_post", "2.resid_post")}, **more
    )


def by_hand(
    tensors: dict[str, Tensor], *, arch: str = "controlvector", version: int = 3, hint: str = "llama", align: int = 0
) -> bytes:
    """A control vector's bytes written from the specification, not by the library."""

    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s.encode())) + s.encode()

    fields = [(text("general.architecture"), 8, text(arch)), (text(f"{arch}.model_hint"), 8, text(hint))]
    fields.append((text("a.list"), 9, struct.pack("<IQ", 4, 2) + struct.pack("<II", 7, 8)))
    fields.append((text("a.flag"), 7, b"\x01"))
    if align:
        fields.append((text("general.alignment"), 4, struct.pack("<I", align)))
    step = align or 32
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    out += b"".join(k + struct.pack("<I", kind) + v for k, kind, v in fields)
    offset, body = 0, b""
    for name, t in tensors.items():
        half = t.dtype == torch.float16
        out += text(name) + struct.pack("<I", t.ndim) + b"".join(struct.pack("<Q", n) for n in t.shape[::-1])
        out += struct.pack("<IQ", 1 if half else 0, offset)
        data = b"".join(struct.pack("<e" if half else "<f", x) for x in t.flatten().tolist())
        body += data + b"\0" * (-len(data) % step)
        offset = len(body)
    return out + b"\0" * (-len(out) % step) + body


def test_a_control_vector_comes_back_at_its_blocks(hm: HookManager, tmp_path: Path) -> None:
    d = direction(hm)
    path = to_gguf(d, tmp_path / "joy.gguf", model_hint="llama")
    held = read_gguf(path)
    assert held.fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert list(held.tensors) == ["direction.1", "direction.2"]
    back = from_gguf(hm, path)
    assert back.sites == d.sites and all(torch.equal(back[s], d[s]) for s in d.sites)
    assert back.name == "joy" and any("block N, from 0" in note for note in back.notes)
    with pytest.raises(ArtifactError, match="overwrite=True"):
        to_gguf(d, path, model_hint="llama")


def test_direction_n_is_what_llama_cpp_adds_to_the_output_of_block_n(hm: HookManager, tmp_path: Path) -> None:
    """Its loader lays direction.N at n_embd · (N − 1); its adapter adds what lies at n_embd · (il − 1) to block il."""
    d = direction(hm)
    held = read_gguf(to_gguf(d, tmp_path / "d.gguf", model_hint="llama")).tensors
    buffer = torch.zeros(2 * D)
    for name, vector in held.items():
        n = int(name.split(".")[1])
        assert n >= 1
        buffer[D * (n - 1) : D * n] += vector
    ids = torch.randint(1, 100, (1, 6))
    handles = []
    for il in range(1, 3):
        part = buffer[D * (il - 1) : D * il]
        block = hm.model.get_submodule(f"model.layers.{il}")
        handles.append(
            block.register_forward_hook(
                lambda m, a, out, part=part: (out[0] + part, *out[1:]) if isinstance(out, tuple) else out + part
            )
        )
    with torch.no_grad():
        wanted = hm.model(ids).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(hm.run(ids, write=d.as_interventions()).logits, wanted)


@pytest.mark.parametrize("arch", ["controlvector", "steeringvector"])
@pytest.mark.parametrize(("version", "align"), [(3, 0), (2, 0), (3, 64)])
def test_files_of_other_writers_are_read(hm: HookManager, tmp_path: Path, arch: str, version: int, align: int) -> None:
    whole, half = torch.randn(D), torch.randn(D).half()
    data = by_hand({"direction.2": half, "direction.0": whole}, arch=arch, version=version, align=align)
    (tmp_path / "theirs.gguf").write_bytes(data)
    d = from_gguf(hm, tmp_path / "theirs.gguf", operation="ablate", name="refusal")
    assert (d.sites, d.operation, d.name) == (["0.resid_post", "2.resid_post"], "ablate", "refusal")
    assert torch.equal(d["0.resid_post"], whole) and torch.equal(d["2.resid_post"], half.float())
    held = read_gguf(tmp_path / "theirs.gguf").fields
    assert held["a.list"] == [7, 8] and held["a.flag"] is True


def test_every_cut_and_every_changed_byte_of_the_header_is_refused_or_read_as_numbers(
    hm: HookManager, tmp_path: Path
) -> None:
    data = by_hand({"direction.1": torch.randn(D), "direction.2": torch.randn(D)})
    path = tmp_path / "bad.gguf"
    for cut in [*range(0, 330, 11), len(data) - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(ArtifactError):
            from_gguf(hm, path)
    for at in range(0, 330, 5):
        for value in (0, 255):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                from_gguf(hm, path)
            except InterpError:
                continue


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"direction.one": torch.ones(D)}, ArtifactError),
        ({"../evil": torch.ones(D)}, ArtifactError),
        ({"direction.1": torch.ones(D), "direction.01": torch.ones(D)}, ArtifactError),
        ({"direction.1": torch.ones(2, D)}, ArtifactError),
        ({"direction.3": torch.ones(D)}, SiteError),
        ({"direction.1": torch.ones(D + 1)}, ShapeError),
        ({"direction.1": torch.zeros(D)}, ShapeError),
        ({"direction.1": torch.full((D,), torch.nan)}, ShapeError),
        ({}, InterpError),
    ],
)
def test_tensors_that_are_no_control_vector_are_refused(
    hm: HookManager, tmp_path: Path, tensors: dict[str, Tensor], kind: type[InterpError]
) -> None:
    (tmp_path / "x.gguf").write_bytes(by_hand(tensors))
    with pytest.raises(kind):
        from_gguf(hm, tmp_path / "x.gguf")


def test_files_of_another_kind_or_for_another_model_are_refused(hm: HookManager, tmp_path: Path) -> None:
    path, one = tmp_path / "x.gguf", {"direction.1": torch.ones(D)}
    for data, match in (
        (by_hand(one, arch="llama"), "not a control vector"),
        (by_hand(one, version=1), "version 1"),
        (by_hand(one, version=3 << 24), "big-endian"),
        (b"PK\x03\x04" + bytes(99), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=match):
            from_gguf(hm, path)
    path.write_bytes(by_hand(one, hint="gemma2"))
    with pytest.raises(ModelError, match="gemma2"):
        from_gguf(hm, path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        from_gguf(hm, tmp_path / "nothing.gguf")


@pytest.mark.parametrize("site", ["0.resid_post", "1.mlp_out", "1.resid_pre"])
def test_what_the_format_cannot_say_is_not_written(hm: HookManager, tmp_path: Path, site: str) -> None:
    with pytest.raises(SiteError, match="no place in a control vector"):
        to_gguf(direction(hm, site), tmp_path / "d.gguf", model_hint="llama")
    with pytest.raises(ArtifactError, match="meant to ablate"):
        to_gguf(direction(hm, operation="ablate"), tmp_path / "d.gguf", model_hint="llama")
    assert not list(tmp_path.iterdir())


def test_the_alignment_of_what_is_written_is_the_format_s(tmp_path: Path) -> None:
    tensors = {"direction.1": torch.randn(5), "direction.2": torch.randn(3, 7)}
    held = read_gguf(write_gguf(tmp_path / "a.gguf", {"general.architecture": "x"}, tensors))
    assert all(torch.equal(held.tensors[k], v) for k, v in tensors.items())
    assert (tmp_path / "a.gguf").stat().st_size % 32 == 0


# -- .pt ------------------------------------------------------------------------------------------------------------


def test_tensors_of_caa_and_dicts_of_layers_are_read(hm: HookManager, tmp_path: Path) -> None:
    v = torch.randn(D)
    torch.save(v, tmp_path / "vec_layer_1_Llama-2-7b-chat-hf.pt")
    caa = from_torch(hm, tmp_path / "vec_layer_1_Llama-2-7b-chat-hf.pt")
    assert caa.sites == ["1.resid_post"] and torch.equal(caa["1.resid_post"], v) and caa.notes
    torch.save(v[None].half(), tmp_path / "direction.pt")
    assert from_torch(hm, tmp_path / "direction.pt", layer=2, operation="ablate").operation == "ablate"
    with pytest.raises(ArtifactError, match="give layer"):
        from_torch(hm, tmp_path / "direction.pt")
    torch.save({2: v, 0: -v}, tmp_path / "layers.pt")
    assert from_torch(hm, tmp_path / "layers.pt", kind="mlp_out").sites == ["0.mlp_out", "2.mlp_out"]
    torch.save({"blocks.1.hook_resid_mid": v}, tmp_path / "named.pt")
    assert from_torch(hm, tmp_path / "named.pt").sites == ["1.resid_mid"]


def test_a_file_that_would_run_something_is_refused_by_name(hm: HookManager, tmp_path: Path) -> None:
    import interp.core.dose as anything

    torch.save({1: anything.Dose()}, tmp_path / "object.pt")
    with pytest.raises(ArtifactError, match="layer_activations"):
        from_torch(hm, tmp_path / "object.pt")
    marker = tmp_path / "was-run"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Touch(marker)))
    for data in (None, b"", b"junk"):
        if data is not None:
            (tmp_path / "evil.pt").write_bytes(data)
        with pytest.raises(ArtifactError, match="no file of plain tensors"):
            from_torch(hm, tmp_path / "evil.pt")
    assert not marker.exists()
    torch.save([torch.ones(D)], tmp_path / "list.pt")
    with pytest.raises(ArtifactError, match="expected a tensor"):
        from_torch(hm, tmp_path / "list.pt")
    with pytest.raises(ArtifactError, match="not there"):
        from_torch(hm, tmp_path / "nothing.pt")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("vectors", "kind"),
    [
        ({9: torch.ones(D)}, SiteError),
        ({"-1": torch.ones(D)}, SiteError),
        ({-1: torch.ones(D)}, SiteError),
        ({1.5: torch.ones(D)}, ArtifactError),
        ({1: torch.ones(D), "1": torch.ones(D)}, ArtifactError),
        ({1: torch.ones(D, dtype=torch.long)}, ShapeError),
        ({1: torch.ones(2, D)}, ShapeError),
    ],
)
def test_keys_and_vectors_that_mean_nothing_here_are_refused(
    hm: HookManager, vectors: dict[Any, Tensor], kind: type[InterpError]
) -> None:
    with pytest.raises(kind):
        from_tensors(hm, vectors)
