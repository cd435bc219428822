"""What holds for every test."""

import signal

from hypothesis import settings

# How fast an example runs is the machine's affair: benchmarks measure, tests do not.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")


def pytest_configure() -> None:
    """Whoever ends the tests from outside ends the daemons that they have started, too: as with Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
