"""What holds for every test."""

import gc
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# How fast an example runs is the machine's affair: benchmarks measure, tests do not.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")


@pytest.fixture(scope="module", autouse=True)
def _real_signatures() -> Iterator[None]:
    """What the simulator puts in the place of signatures goes with the module that used it."""
    yield
    if (stand_ins := sys.modules.get("tests.sim.signatures")) is not None:
        stand_ins.uninstall()


def pytest_configure() -> None:
    """Whoever ends the tests from outside ends the daemons that they have started, too: as with Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Ten thousand collected tests would otherwise be walked through by each full collection of garbage."""
    gc.collect()
    gc.freeze()
