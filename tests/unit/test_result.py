"""Results on disk: what is saved comes back, what is not whole is refused, nothing is overwritten by accident."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from interp.core.disk import atomic_write
from interp.core.errors import ArtifactError
from interp.core.result import Provenance, Result

SOURCE = Provenance(model="tiny", seed=3, settings={"k": 4, "sites": ["0.z"]}, versions={"torch": "2"})


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Measured(Result):
    values: Tensor
    names: list[str] = field(default_factory=list)
    extra: Any = None

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame({"value": self.values.flatten().tolist()})

    def plot(self) -> go.Figure:
        return go.Figure()

    def summary(self) -> str:
        return f"{self.values.numel()} values of <{', '.join(self.names)}>"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Other(Measured):
    pass


def _measured(**changes: Any) -> Measured:
    return Measured(provenance=SOURCE, values=torch.arange(6.0).reshape(2, 3), names=["a", "b"], **changes)


@pytest.mark.parametrize(
    "extra",
    [
        None,
        "text ⏎ <b>",
        {3: "three", 4: "four"},
        (1, [2, (3.5, None)], {"k": True}),
        [math.inf, -math.inf],
        {"$tensor": "not a tensor"},
        {},
        [],
    ],
)
def test_fields_come_back_equal_and_of_the_same_type(extra: Any, tmp_path: Path) -> None:
    loaded = Measured.load(_measured(extra=extra).save(tmp_path / "r"))
    assert loaded.extra == extra and type(loaded.extra) is type(extra)
    assert loaded.provenance == SOURCE and loaded.names == ["a", "b"]
    assert torch.equal(loaded.values, torch.arange(6.0).reshape(2, 3))


def test_nan_comes_back_as_nan(tmp_path: Path) -> None:
    loaded = Measured.load(_measured(extra=math.nan).save(tmp_path / "r"))
    assert math.isnan(loaded.extra)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back_bit_equal_in_their_dtype_also_empty_shared_and_strided(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = torch.arange(12).reshape(3, 4).to(dtype)
    extra = [base, base.T, base[:, 1:3], torch.zeros(0, 2, dtype=dtype), base[0, 0]]
    loaded = Measured.load(_measured(extra=extra).save(tmp_path / "r"))
    for ours, theirs in zip(loaded.extra, extra, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (_measured().save(tmp_path / name) for name in "ab")
    for name in ("result.json", "tensors.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_base_class_loads_any_result_and_a_subclass_only_its_own(tmp_path: Path) -> None:
    folder = _measured().save(tmp_path / "r")
    assert type(Result.load(folder)) is Measured
    with pytest.raises(ArtifactError, match=r"Measured, not a Other"):
        Other.load(folder)


def test_a_class_that_nobody_imported_is_refused_and_not_imported(tmp_path: Path) -> None:
    folder = _measured().save(tmp_path / "r")
    record = json.loads((folder / "result.json").read_text())
    for name, complaint in (("antigravity.Fly", "import its module"), ("interp.no_such.Thing", "does not have")):
        (folder / "result.json").write_text(json.dumps({**record, "class": name}))
        with pytest.raises(ArtifactError, match=complaint):
            Result.load(folder)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "result.json").unlink(), "holds no result.json"),
        (lambda f: (f / "result.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "result.json").write_text("[]"), "not the record"),
        (lambda f: (f / "tensors.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "tensors.safetensors").write_bytes(b"xx"), "cannot be read"),
        (lambda f: _edit(f, lambda r: r.update(format=99)), "format 99"),
        (lambda f: _edit(f, lambda r: r["fields"].update(later=1)), "later"),
        (lambda f: _edit(f, lambda r: r["fields"].update(values={"$tensor": "gone"})), "lacks the tensor 'gone'"),
        (lambda f: _edit(f, lambda r: r["fields"].update(values={"a": 1, "b": 2})), "damaged"),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(damage: Any, complaint: str, tmp_path: Path) -> None:
    folder = _measured().save(tmp_path / "r")
    damage(folder)
    with pytest.raises(ArtifactError, match=complaint):
        Measured.load(folder)


def _edit(folder: Path, change: Any) -> None:
    record = json.loads((folder / "result.json").read_text())
    change(record)
    (folder / "result.json").write_text(json.dumps(record))


def test_what_is_there_is_kept_unless_overwriting_was_asked_for(tmp_path: Path) -> None:
    folder = _measured().save(tmp_path / "r")
    with pytest.raises(ArtifactError, match="overwrite=True"):
        _measured().save(folder)
    _measured(extra="new").save(folder, overwrite=True)
    assert Measured.load(folder).extra == "new"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"chapter\.txt"):
        _measured().save(tmp_path / "thesis", overwrite=True)
    with pytest.raises(ArtifactError, match="is a file"):
        _measured().save(tmp_path / "thesis" / "chapter.txt")


def test_a_save_that_fails_leaves_the_old_result_and_no_trace(tmp_path: Path) -> None:
    folder = _measured(extra="old").save(tmp_path / "r")
    with pytest.raises(ArtifactError, match=r"field extra\.1 holds a object"):
        _measured(extra=[1, object()]).save(folder, overwrite=True)
    assert Measured.load(folder).extra == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_file_written_atomically_has_ordinary_permissions_and_replaces_the_old_one(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    for content in ("first", b"second"):
        path = atomic_write(tmp_path / "deep" / "file", content)
    assert path.read_text() == "second" and path.stat().st_mode == plain.stat().st_mode
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_text() == "second" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_result_prints_its_summary_and_escapes_it_in_a_notebook() -> None:
    result = _measured()
    assert repr(result) == "Measured: 6 values of <a, b>"
    assert "&lt;a, b&gt;" in result._repr_html_()
