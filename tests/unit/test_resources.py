"""Packaged data and configs, in the checkout and in a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from interp import ArtifactError
from interp.core.resources import FOLDERS, resource


def tracked(repo: Path) -> set[str]:
    return {
        path.relative_to(repo).as_posix() for name in FOLDERS for path in (repo / name).rglob("*") if path.is_file()
    }


def test_a_resource_of_the_checkout_is_its_file(repo: Path) -> None:
    assert resource("data/README.md") == repo / "data" / "README.md"
    assert resource("configs") == repo / "configs"


@pytest.mark.parametrize(
    "name", ["../README.md", "configs/../pyproject.toml", "/etc/hostname", "", "interp", "configs2"]
)
def test_a_name_outside_the_folders_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="outside configs and data"):
        resource(name)


def test_an_unknown_resource_lists_what_is_there() -> None:
    with pytest.raises(ArtifactError, match=r"data holds: .*data/README\.md"):
        resource("data/no-such-file")


def test_a_wheel_carries_the_resources_and_finds_them_where_it_is_installed(repo: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=repo, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("interp-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert {f"interp/_resources/{name}" for name in tracked(repo)} <= names
    assert "interp/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "notebooks/"))]
    code = "import interp, interp.core.resources as r; print(interp.__file__); print(r.resource('data/README.md'))"
    # The wheel's folder comes first on the path, before an editable install of the checkout.
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, found = (Path(line) for line in run.stdout.splitlines())
    assert where == site / "interp" / "__init__.py"
    assert found == site / "interp" / "_resources" / "data" / "README.md"
    assert found.read_bytes() == (repo / "data" / "README.md").read_bytes()
