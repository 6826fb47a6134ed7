"""README.md for a package index: ``python -m headq_ao.evals.results.links --help``; see ``make release``."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from headq_ao.evals.results.documents import write

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#|/)(?P<path>[^)\s]+)\)")


def absolute(text: str, site: str) -> str:
    """Markdown whose relative links begin at ``site``, its images where a ``/blob/`` is ``/raw/``.

    Example:
        >>> from headq_ao.evals.results.links import absolute
        >>> absolute("[a](docs/a.md#b) ![c](c.png) [d](#d)", "https://host/me/it/blob/v1")
        '[a](https://host/me/it/blob/v1/docs/a.md#b) ![c](https://host/me/it/raw/v1/c.png) [d](#d)'
    """
    base = site.rstrip("/")

    def whole(match: re.Match[str]) -> str:
        start = base.replace("/blob/", "/raw/") if match["image"] else base
        return f"{match['image']}[{match['text']}]({start}/{match['path']})"

    return LINK.sub(whole, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite files in place."""
    parser = argparse.ArgumentParser("python -m headq_ao.evals.results.links", description=__doc__)
    parser.add_argument("site", help="where the files of the release are shown: https://HOST/OWNER/NAME/blob/TAG")
    parser.add_argument("files", nargs="+", type=Path, help="Markdown files, changed in place: take copies")
    args = parser.parse_args(argv)
    if not args.site.startswith("https://"):
        parser.error(f"SITE must begin with https://, got {args.site!r}")
    for path in args.files:
        write(path, absolute(path.read_text(encoding="utf-8"), args.site))
    return 0


if __name__ == "__main__":
    sys.exit(main())
