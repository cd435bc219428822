"""What holds for every test."""

from hypothesis import settings

# How fast an example runs is the machine's affair: benchmarks measure, tests do not.
settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")
