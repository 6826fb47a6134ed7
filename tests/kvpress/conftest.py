"""The saved tiny model of the evaluations' tests."""

from tests.evals.conftest import tiny_folder

__all__ = ["tiny_folder"]
