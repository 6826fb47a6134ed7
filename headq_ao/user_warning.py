"""Warnings that point to the user's line, not to a line of a library that was called in between."""

import sys
import warnings

PASSED_BY = frozenset({"headq_ao", "torchao", "transformers", "accelerate", "torch", "contextlib"})


def warn(text: str, *, again: bool = False) -> None:
    """Give a UserWarning at the innermost line outside this package and the libraries that call it.

    Args:
        text: of the warning.
        again: also where the same words were given for that line before, as for another model.

    Example:
        >>> import warnings
        >>> from headq_ao.user_warning import warn
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     warn("HeadQ: something to know")
        >>> str(seen[0].message), seen[0].category.__name__
        ('HeadQ: something to know', 'UserWarning')
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED_BY:
        frame = frame.f_back
    registry = {} if again else frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__", "sys")
    warnings.warn_explicit(text, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry=registry)
