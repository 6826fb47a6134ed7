"""Tasks for lm-eval that need no hub: give this folder to ``--include_path``."""
