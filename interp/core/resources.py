"""Packaged data and configs, found in a wheel and in an editable install alike."""

from pathlib import Path

from interp.core.errors import ArtifactError

__all__ = ["FOLDERS", "resource"]

FOLDERS = ("configs", "data")


def resource(name: str) -> Path:
    """Find a packaged file or folder.

    Args:
        name: Path below the package's resources, such as "configs/train-tiny.yaml"; it starts with "configs" or "data".

    Returns:
        The absolute path of an existing file or folder.

    Raises:
        ArtifactError: The name leaves its folder, or nothing has that name; the message lists what is there.
    """
    root = _root()
    path = (root / name).resolve()
    allowed = [(root / folder).resolve() for folder in FOLDERS]
    folder = next((folder for folder in allowed if path == folder or folder in path.parents), None)
    if folder is None:
        raise ArtifactError(f"resource {name!r} lies outside {' and '.join(FOLDERS)}; write it as 'configs/NAME'")
    if not path.exists():
        raise ArtifactError(
            f"no resource {name!r}; {folder.name} holds: {', '.join(_names(folder, root)) or 'nothing'}"
        )
    return path


def _root() -> Path:
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_resources"
    return packaged if packaged.is_dir() else package.parent


def _names(folder: Path, root: Path) -> list[str]:
    return sorted(path.relative_to(root.resolve()).as_posix() for path in folder.rglob("*") if path.is_file())
