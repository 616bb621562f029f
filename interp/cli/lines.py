"""What command lines with a config file have in common."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import tyro
from pydantic import BaseModel, ValidationError

from interp.core.errors import ConfigError
from interp.core.settings import describe_faults, read_yaml

__all__ = ["config_file", "read_line", "refuse", "tell", "value_on"]

_BAD_USAGE = 2

_Line = TypeVar("_Line", bound=BaseModel)


def config_file(argv: list[str], config: type[BaseModel]) -> tuple[str | None, list[str]]:
    """The config file on a line, with or without --config, and the other words.

    It decides the defaults that the rest is read with, so it must be known before.

    Args:
        argv: the words of the line.
        config: the settings that have options; more words after an option of a list are taken for its values.

    Raises:
        ConfigError: there are two.
    """
    found, others, rest = [], [], iter(argv)
    flags = {f"--{name}" for name in ("help", "dry-run", "json", "force", "resume")} | _switches(config)
    lists, listed = _lists(config), False
    for word in rest:
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--config":
            found.append(word.partition("=")[2] if equals else next(rest, ""))
        elif word.startswith("-"):
            others.append(word)
            if not equals and name not in flags and word != "-h" and (value := next(rest, "")):
                others.append(value)
                listed = name in lists
                continue
            listed = False
        elif listed and not word.endswith((".yaml", ".yml")):
            others.append(word)
        else:
            found.append(word)
    if len(found) > 1:
        raise ConfigError(f"one config file is read, got {' and '.join(found)}; did one of them lack its --option?")
    return (found[0] if found else None), others


def read_line(
    line: type[_Line],
    config: type[BaseModel],
    argv: Sequence[str],
    *,
    prog: str,
    stand_in: Mapping[str, Any],
    given: Callable[[str | None, list[str]], Mapping[str, Any]] | None = None,
) -> _Line:
    """Read a command line whose settings go before those of the config file that it names.

    Args:
        line: the options of the line, those of the settings among them.
        config: the settings.
        argv: the words.
        prog: what the help calls the command.
        stand_in: values of required settings that let the rest be checked, and are never used.
        given: the settings to begin with, from the config file on the line (or None) and the other words; by default
            those of the file.

    Raises:
        ConfigError: what is wrong, in one line.
    """
    try:
        path, words = config_file(list(argv), config)
        held = given(path, words) if given is not None else {} if path is None else read_yaml(path)
        default = _line_with_defaults(line, config, held, stand_in)
        found = tyro.cli(line, prog=prog, args=words, default=default)
        config.model_validate({name: getattr(found, name) for name in config.model_fields})
    except ValidationError as err:
        raise ConfigError(describe_faults(err, config)) from err
    return found


def refuse(message: str) -> int:
    """Say on stderr what is wrong with a command line; gives the exit code of bad usage."""
    sys.stderr.write(f"error: {message}\n")
    return _BAD_USAGE


def tell(message: str) -> None:
    """Say something on stderr, between the lines of a progress bar and not into one."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def value_on(words: list[str], option: str) -> str | None:
    """The value of an option on the line."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _options(config: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a configuration, without their dashes, and their types."""
    for name, field in config.model_fields.items():
        word, kind = name.replace("_", "-"), field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _options(kind, f"{path}{word}.")
        else:
            yield f"{path}{word}", kind


def _switches(config: type[BaseModel]) -> set[str]:
    """The options that take no value."""
    names = [name.rpartition(".") for name, kind in _options(config) if kind is bool]
    return {f"--{path}{dot}{no}{word}" for path, dot, word in names for no in ("", "no-")}


def _lists(config: type[BaseModel]) -> set[str]:
    """The options that take several values."""
    kinds = {name: (kind, *get_args(kind)) for name, kind in _options(config)}  # a list, or a list or None
    return {f"--{name}" for name, parts in kinds.items() if any(get_origin(part) in (list, tuple) for part in parts)}


def _line_with_defaults(
    line: type[_Line], config: type[BaseModel], given: Mapping[str, Any], stand_in: Mapping[str, Any]
) -> _Line:
    """The settings that those on the line go before; what they leave out, and the line must give, is marked missing."""
    required = {name for name, field in config.model_fields.items() if field.is_required()}
    checked = config.model_validate({**{name: stand_in[name] for name in required - given.keys()}, **given})
    values: dict[str, Any] = {name: getattr(checked, name) for name in config.model_fields}
    values.update(dict.fromkeys(required - given.keys(), tyro.MISSING))
    return line.model_construct(**values)
