"""How a token is written and read; knows no cache and no model."""
