"""Directions: what a dose is, what their algebra keeps and drops, what a file gives back and refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from interp.core.direction import Direction, Dose, SiteScale, measure_scale
from interp.core.errors import ArtifactError, ConfigError, DataError, InterpError, ModelError, ShapeError, SiteError
from interp.core.intervention import Add, Project, SetProjection
from interp.core.result import Provenance
from interp.core.where import Where

MODEL = Provenance(model="tiny", config_hash="aa", data_hash="dd", seed=3, settings={"k": 1})
SCALE = SiteScale(rms=10.0, sigma=2.0, positive=3.0, negative=-1.0, largest=7.0)


def direction(**fields: Any) -> Direction:
    """Two sites: [3, 4, 0] of length 5 with a scale, and one without."""
    held = {
        "vectors": {"1.resid_post": torch.tensor([3.0, 4.0, 0.0]), "2.resid_post": torch.tensor([0.0, 0.0, 2.0])},
        "method": "mean_difference",
        "model": MODEL,
        "scale": {"1.resid_post": SCALE},
        "stats": {"1.resid_post": {"auroc": 0.9, "p": math.nan}},
        "name": "joy",
        "notes": ("a note",),
    }
    return Direction(**{**held, **fields})


# -- doses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "length"), [("raw", 5.0), ("rms", 10.0), ("sigma", 2.0), ("gap", 4.0), ("largest", 7.0)]
)
def test_a_dose_adds_what_its_unit_says(unit: str, length: float) -> None:
    (edit,) = direction().at("1.resid_post").as_interventions(Dose(-1.5, unit))
    assert isinstance(edit, Add) and isinstance(edit.scale, float)
    torch.testing.assert_close(edit.scale * edit.vector, -1.5 * length * torch.tensor([0.6, 0.8, 0.0]))


def test_a_raw_dose_needs_no_scale_and_is_the_fitted_vector_itself() -> None:
    one, two = direction().as_interventions(2.0)
    assert isinstance(one, Add) and isinstance(two, Add)
    assert torch.equal(one.vector * one.scale, torch.tensor([6.0, 8.0, 0.0]))
    assert torch.equal(two.vector * two.scale, torch.tensor([0.0, 0.0, 4.0]))
    with pytest.raises(ConfigError, match=r"no scale there.*measure_direction"):
        direction().as_interventions(Dose(1.0, "sigma"))


def test_a_dose_per_row_is_a_coefficient_per_row() -> None:
    doses = torch.tensor([0.0, 1.0, -2.0])
    (edit,) = direction().at("1.resid_post").as_interventions(Dose(doses, "sigma"))
    assert isinstance(edit, Add)
    torch.testing.assert_close(edit.scale, doses * 2.0)


def test_set_and_ablate_act_on_the_unit_direction() -> None:
    where = Where(pos=1)
    (edit,) = direction().at("1.resid_post").as_interventions(Dose(1.5, "sigma"), where=where, operation="set")
    assert isinstance(edit, SetProjection) and edit.value == 3.0 and edit.where == where
    (gone,) = direction(operation="ablate").at("1.resid_post").as_interventions()
    assert isinstance(gone, Project)
    with pytest.raises(ConfigError, match="no dose"):
        direction(operation="ablate").as_interventions(2.0)
    with pytest.raises(SiteError, match="one vector a position"):
        Direction({"0.z": torch.ones(2, 3)}, "given", MODEL).as_interventions(operation="ablate")


@pytest.mark.parametrize("unit", ["gap", "largest"])
def test_a_unit_that_was_not_measured_is_refused(unit: str) -> None:
    bare = direction(scale={"1.resid_post": SiteScale(1.0, 1.0)}).at("1.resid_post")
    with pytest.raises(ConfigError, match="not known"):
        bare.as_interventions(Dose(1.0, unit))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [True, "2", None, Dose(1.0, "sigmas"), torch.ones(2, 2)])
def test_what_is_no_dose_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError):
        direction().as_interventions(bad)


def test_a_largest_projection_below_zero_is_no_unit() -> None:
    d = direction(scale={"1.resid_post": SCALE._replace(largest=-2.0)}).at("1.resid_post")
    with pytest.raises(ConfigError, match="point the other way"):
        d.as_interventions(Dose(1.0, "largest"))


def test_a_dose_of_zero_may_do_nothing_and_any_other_may_not() -> None:
    for dose, free in ((0.0, True), (1e-6, False), (torch.zeros(2), True), (torch.tensor([0.0, 1.0]), False)):
        (edit,) = direction().at("1.resid_post").as_interventions(dose)
        assert edit.may_do_nothing is free


# -- measuring ------------------------------------------------------------------------------------------------------


def test_the_scale_is_that_of_the_projections() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    has, v = torch.arange(200) % 2 == 0, torch.tensor([0.0, 2.0, 0.0])
    found = measure_scale(x, v, positive=has)
    along = x[:, 1].double()
    wanted = SiteScale(
        float(x.double().norm(dim=1).square().mean().sqrt()),
        float(along.std(unbiased=False)),
        float(along[has].mean()),
        float(along[~has].mean()),
        float(along.max()),
    )
    assert found == pytest.approx(wanted)
    back = measure_scale(x, -v, positive=~has)
    assert found.reversed()[:4] == pytest.approx(back[:4])
    with pytest.raises(DataError, match="zero"):
        measure_scale(x, torch.zeros(3))
    with pytest.raises(DataError, match="no activations"):
        measure_scale(x[:0], v)


# -- algebra --------------------------------------------------------------------------------------------------------


def test_sums_add_at_shared_sites_and_carry_the_others() -> None:
    other = Direction({"2.resid_post": torch.ones(3), "4.mlp_out": torch.ones(3)}, "pca", MODEL, name="awe")
    total = direction() + other
    assert total.sites == ["1.resid_post", "2.resid_post", "4.mlp_out"]
    assert torch.equal(total["2.resid_post"], torch.tensor([1.0, 1.0, 3.0]))
    assert torch.equal(total["1.resid_post"], direction()["1.resid_post"])
    assert total.scale == {"1.resid_post": SCALE} and not total.stats
    assert (total.name, total.method) == ("joy + awe", "mean_difference + pca")
    assert total.model.data_hash is None and total.model.config_hash == "aa" and total.notes == ("a note",)
    less = direction() - other
    assert torch.equal(less["4.mlp_out"], -torch.ones(3)) and less.name == "joy - awe"
    back = total - other.at("2.resid_post")
    assert torch.equal(back["2.resid_post"], direction()["2.resid_post"])


def test_a_measured_scale_goes_with_a_sum() -> None:
    d = direction().at("1.resid_post")
    assert not (d + d).scale
    with pytest.raises(ConfigError, match="no scale"):
        (d + d).as_interventions(Dose(1.0, "rms"))


def test_numbers_stretch_and_turn() -> None:
    d = direction()
    for longer in (2 * d, d * 2, d / 0.5):
        assert torch.equal(longer["1.resid_post"], torch.tensor([6.0, 8.0, 0.0]))
        assert longer.scale == d.scale
    turned = -d
    assert torch.equal(turned["1.resid_post"], torch.tensor([-3.0, -4.0, 0.0]))
    assert turned.scale["1.resid_post"][:4] == (10.0, 2.0, 1.0, -3.0)
    (a,), (b,) = (x.at("1.resid_post").as_interventions(Dose(1.0, "gap")) for x in (d, turned))
    assert isinstance(a, Add) and isinstance(b, Add)
    torch.testing.assert_close(a.scale * a.vector, -b.scale * b.vector)


@pytest.mark.parametrize("factor", [0, 0.0, math.nan, math.inf])
def test_a_factor_that_leaves_no_direction_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="no direction"):
        direction() * factor
    with pytest.raises(TypeError):
        direction() * True


def test_directions_that_do_not_belong_together_are_refused() -> None:
    d = direction()
    elsewhere = replace(d, model=replace(MODEL, config_hash="bb"))
    with pytest.raises(ModelError, match="nothing to do with each other"):
        d + elsewhere
    with pytest.raises(ModelError, match="folded"):
        d - replace(d, folded=True)
    with pytest.raises(ModelError):
        d.cosine(elsewhere)
    with pytest.raises(ConfigError, match="ablate"):
        d + replace(d, operation="ablate")
    with pytest.raises(ShapeError, match="shapes"):
        d + replace(d, vectors={"1.resid_post": torch.ones(4)}, scale={}, stats={})
    with pytest.raises(DataError, match="cancel at 1"):
        d - d


def test_lengths_are_made_one_or_another_s() -> None:
    d = direction()
    assert all(abs(float(v.norm()) - 1) < 1e-6 for v in d.unit().vectors.values())
    torch.testing.assert_close(d.unit("1.resid_post"), torch.tensor([0.6, 0.8, 0.0]))
    other = replace(d, vectors={s: torch.randn(3) * 9 for s in d.sites})
    matched = other.matched(d)
    assert [float(v.norm()) for v in matched.vectors.values()] == pytest.approx([5.0, 2.0])
    assert matched.cosine(other) == pytest.approx(dict.fromkeys(d.sites, 1.0))
    with pytest.raises(ConfigError, match="above 0"):
        d.matched(0.0)
    with pytest.raises(SiteError, match="no vector at 2"):
        d.matched(d.at("1.resid_post"))


def test_what_is_left_outside_a_span_is_orthogonal_to_it() -> None:
    draw = torch.Generator().manual_seed(1)
    d, *others = (Direction({"1.resid_post": torch.randn(8, generator=draw)}, "given", MODEL) for _ in range(4))
    left = d.orthogonal_to(others)
    assert all(abs(c) < 1e-6 for o in others for c in left.cosine(o).values())
    again = d.orthogonal_to([*others, others[0] * 3])  # the same span, with directions that depend on each other
    torch.testing.assert_close(left["1.resid_post"], again["1.resid_post"])
    assert left.orthogonal_to(others).cosine(left)["1.resid_post"] == pytest.approx(1.0)
    with pytest.raises(DataError, match="in the span"):
        (others[0] + others[1]).orthogonal_to(others)
    with pytest.raises(SiteError, match="none of the others"):
        direction().orthogonal_to(replace(direction().at("1.resid_post"), vectors={"3.z": torch.ones(2, 2)}))


# -- what is no direction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "kind"),
    [
        ({}, SiteError),
        ({"nowhere": torch.ones(2)}, SiteError),
        ({"1.pattern": torch.ones(2)}, SiteError),
        ({"1.resid_post": torch.ones(2), "blocks.1.hook_resid_post": torch.ones(2)}, SiteError),
        ({"1.resid_post": torch.zeros(2)}, ShapeError),
        ({"1.resid_post": torch.tensor([1.0, math.nan])}, ShapeError),
        ({"1.resid_post": torch.ones(2, dtype=torch.long)}, ShapeError),
    ],
)
def test_what_is_no_direction_is_refused(vectors: dict[str, Any], kind: type[InterpError]) -> None:
    with pytest.raises(kind):
        Direction(vectors, "given", MODEL)


def test_a_direction_owns_its_vectors() -> None:
    mine = torch.ones(3)
    d = Direction({"1.resid_post": mine}, "given", MODEL)
    mine.zero_()
    assert torch.equal(d["blocks.1.hook_resid_post"], torch.ones(3))


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_every_field(tmp_path: Path) -> None:
    d = direction(name="</script>\u202e ☃", operation="ablate", read_at="Where(pos=-1)", folded=True)
    path = d.save(tmp_path / "deep" / "joy.safetensors")
    back = Direction.load(path)
    for field in ("method", "model", "operation", "read_at", "scale", "name", "folded", "notes", "sites"):
        assert getattr(back, field) == getattr(d, field), field
    assert all(torch.equal(back[s], d[s]) for s in d.sites)
    assert back.stats["1.resid_post"]["auroc"] == 0.9 and math.isnan(back.stats["1.resid_post"]["p"])
    assert [p.name for p in path.parent.iterdir()] == ["joy.safetensors"]
    assert math.isinf(
        Direction.load(replace(d, stats={"1.resid_post": {"t": math.inf}}).save(path, overwrite=True)).stats[
            "1.resid_post"
        ]["t"]
    )


def test_a_file_is_not_overwritten_unasked_and_a_folder_never(tmp_path: Path) -> None:
    path = direction().save(tmp_path / "joy")
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="overwrite=True"):
        (2 * direction()).save(path)
    assert path.read_bytes() == before
    (2 * direction()).save(path, overwrite=True)
    assert path.read_bytes() != before
    with pytest.raises(ArtifactError, match="folder"):
        direction().save(tmp_path, overwrite=True)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -1])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = direction().save(tmp_path / "joy")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"cannot be read|holds no direction"):
        Direction.load(path)


def _record(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return dict(json.loads(file.metadata()["interp.direction"]))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"sites": ["../../etc/passwd"]},
        {"sites": ["9.resid_post"]},
        {"sites": 3},
        {"sites": []},
        {"operation": "destroy"},
        {"operation": ["add"]},
        {"scale": []},
        {"scale": {"1.resid_post": [1, 2, 3, 4, 5, 6]}},
        {"scale": {"nowhere": [1, 2]}},
        {"stats": {"1.resid_post": {"a": "b"}}},
        {"model": {"model": "m", "more": 1}},
        {"model": None},
        {"notes": 4},
        {"method": None, "vectors": 3, "sites": {"a": 1}},
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    record = {**_record(direction().save(tmp_path / "joy")), **change}
    save_file(
        {"1.resid_post": torch.ones(3), "2.resid_post": torch.ones(3)},
        tmp_path / "bad",
        {"interp.direction": json.dumps(record)},
    )
    with pytest.raises(ArtifactError):
        Direction.load(tmp_path / "bad")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "theirs")
    for header in ("[" * 100_000, "{", "[]", "7"):
        save_file({"w": torch.ones(2)}, tmp_path / "odd", {"interp.direction": header})
        with pytest.raises(ArtifactError):
            Direction.load(tmp_path / "odd")
    for name in ("theirs", "nothing", "."):
        with pytest.raises(ArtifactError):
            Direction.load(tmp_path / name)


# -- looking --------------------------------------------------------------------------------------------------------


def test_the_table_and_the_page_show_each_site_escaped() -> None:
    d = direction(name="<script>alert(1)</script>", notes=("<b>bold</b>",))
    frame = d.to_frame()
    assert frame["site"].tolist() == d.sites and frame["norm"].tolist() == [5.0, 2.0]
    assert frame["gap"][0] == 4.0 and frame["auroc"][0] == 0.9 and math.isnan(frame["gap"][1])
    page = d._repr_html_()
    assert "<script>" not in page and "<b>bold" not in page and "1.resid_post" in page
