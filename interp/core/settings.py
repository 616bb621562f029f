"""Settings: pydantic models that read and write YAML, and say in one line what is wrong with which of them."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from interp.core.errors import ConfigError, nearest

__all__ = ["Settings", "describe_faults", "read_yaml"]


class Settings(BaseModel):
    """A group of settings: what is not known is refused, nothing is changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read complete settings from a YAML file.

        Args:
            path: the file.

        Raises:
            ConfigError: the file is missing or not YAML, or a setting is unknown, missing or out of range.
        """
        try:
            return cls.model_validate(read_yaml(path))
        except ValidationError as err:
            raise ConfigError(f"{path}: {describe_faults(err, cls)}") from err

    def to_yaml(self) -> str:
        """All settings as YAML, in the order of their fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping of settings.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        beside = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise ConfigError(f"no config file {file}; {nearest(file.name, beside) or 'give the path of a YAML file'}")
    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        fault = " ".join(str(err).split())
        raise ConfigError(f"{file} is not YAML: {fault}") from err
    if not isinstance(held, dict):
        raise ConfigError(f"{file} holds a {type(held).__name__}; expected settings as 'name: value' lines")
    return held


def describe_faults(error: ValidationError, config: type[BaseModel]) -> str:
    """Say in one line what is wrong with which settings, with the nearest known name for an unknown one.

    Args:
        error: what pydantic raised.
        config: the model that was validated.
    """
    return "; ".join(_fault(fault, config) for fault in error.errors())


def _fault(fault: Any, config: type[BaseModel]) -> str:
    *path, last = [str(part) for part in fault["loc"]] or [""]
    name = ".".join([*path, last]).strip(".")
    if fault["type"] == "extra_forbidden":
        for part in path:
            inner = config.model_fields[part].annotation
            config = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else config
        known = list(config.model_fields)
        return f"unknown setting {name!r}; {nearest(last, known) or 'known: ' + ', '.join(known)}"
    if fault["type"] == "missing":
        return f"{name} is missing ({config.model_fields[last].description})" if not path else f"{name} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    came = "" if isinstance(fault["input"], dict | BaseModel) else f", got {fault['input']!r}"
    return f"{name}: {message}{came}" if name else f"{message}{came}"
