"""The trainer child process; the only package that imports torch."""
