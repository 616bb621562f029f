"""Which contract tests run under the type checker: it triples their time, so a spread of families has it, not all."""

from collections.abc import Iterator

import jaxtyping
import pytest

CHECKED = ("GPT2", "Gemma2", "Mixtral", "Bloom", "Falcon")
"""Between them: fused and grouped projections, sandwich norms, experts, tapped, read-only and refused patterns."""


@pytest.fixture(autouse=True)
def _checked_on_some_families(request: pytest.FixtureRequest) -> Iterator[None]:
    callspec = getattr(request.node, "callspec", None)
    skip = callspec is not None and callspec.params.get("name") not in CHECKED
    jaxtyping.config.update("jaxtyping_disable", skip)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
