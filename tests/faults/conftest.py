"""Fixtures of the tests that make things go wrong around a run."""

from commands import command  # noqa: F401  a fixture
