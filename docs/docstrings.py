"""What griffe is told of this package's docstrings: ``Example:`` holds a doctest, as its ``Examples:`` does."""

import re
from typing import Any

from griffe import Extension


class Doctests(Extension):
    """Rename the section, so that it is shown as code."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Of each module, class and function that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
