"""The errors that `interp` raises, all below `InterpError`.

    InterpError
    ├── SiteError       an unknown site name, or a site this model does not have
    ├── WhereError      positions, heads or rows that do not exist, or that select nothing
    ├── ShapeError      a tensor whose shape, dtype or device does not fit its site
    ├── ModelError      a model that cannot be loaded, hooked or used in this way
    ├── HookError       a hook that never fired, or fired in an unexpected place
    ├── DataError       text, tokens or prompts that cannot be used
    ├── ConfigError     a setting that is unknown, out of range or contradictory
    └── ArtifactError   a file or folder that is missing, damaged or of another kind

A message says what was wrong, what came, what was expected, and what to do next.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "ConfigError",
    "DataError",
    "HookError",
    "InterpError",
    "ModelError",
    "ShapeError",
    "SiteError",
    "WhereError",
    "nearest",
]


class InterpError(Exception):
    """Base of every error that `interp` raises on purpose."""


class SiteError(InterpError, ValueError):
    """A site name that does not parse, or a site that this model does not have."""


class WhereError(InterpError, ValueError):
    """Positions, heads or rows that do not exist in this batch, or that select nothing."""


class ShapeError(InterpError, ValueError):
    """A tensor whose shape, dtype or device does not fit the site it is meant for."""


class ModelError(InterpError, RuntimeError):
    """A model that cannot be loaded, hooked or used in the way that was asked."""


class HookError(InterpError, RuntimeError):
    """A hook that did not fire, or fired where it should not have."""


class DataError(InterpError, ValueError):
    """Text, tokens or prompts that cannot be used."""


class ConfigError(InterpError, ValueError):
    """A setting that is unknown, out of range or contradicts another."""


class ArtifactError(InterpError, RuntimeError):
    """A file or folder that is missing, damaged or of another kind than asked for."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """Return a phrase such as `did you mean 'resid_post'?`, or an empty string when nothing is near.

    Args:
        word: what the user wrote.
        known: the names that would have been right.
        n: how many names to offer at most.
    """
    close = difflib.get_close_matches(word, list(known), n=n, cutoff=0.5)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
