"""The run-time type checker of the tests, named in pyproject.toml: shapes and types of every call into the library."""

import typing

from beartype import BeartypeConf, FrozenDict, beartype

# jaxtyping decorates each method on its own, where beartype cannot know the class that `Self` stands for.
checked = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({typing.Self: typing.Any})))
