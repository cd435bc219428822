"""Where the lab cannot be built, its tests are skipped, with the one reason why."""

import pytest

from tests.natlab.needs import find_missing

MISSING = find_missing()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: real daemons for a minute or more; `make natlab SHORT=1` leaves them out")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING is not None:
        for item in items:
            if "natlab" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=MISSING))
