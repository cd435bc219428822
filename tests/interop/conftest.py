"""What the tests with foreign implementations share."""

from collections.abc import AsyncIterator

import pytest

from tests.interop.puppets import Theatre


@pytest.fixture
async def theatre() -> AsyncIterator[Theatre]:
    """Starts processes and ends them with the test."""
    theatre = Theatre()
    yield theatre
    await theatre.stop()
