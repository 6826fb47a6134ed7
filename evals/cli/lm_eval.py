"""The script ``headq-lm-eval``, which says in one line where lm-eval is missing."""

from headq_ao.evals.cli.console import complain


def main() -> int:
    """:func:`headq_ao.evals.lm_eval.__main__.main`; 2 without lm-eval."""
    try:
        from headq_ao.evals.lm_eval.__main__ import main as run
    except ModuleNotFoundError as error:
        complain(str(error))
        return 2
    return run()
