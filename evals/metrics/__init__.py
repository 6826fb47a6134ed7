"""Errors that a model can see, as formulas and measured through a cache."""
