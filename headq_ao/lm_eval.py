"""An alias of :mod:`headq_ao.evals.lm_eval` for one version; ``python -m headq_ao.lm_eval`` is ``headq-lm-eval``."""

import sys

from headq_ao.evals.lm_eval import HeadQLM, ModelArgumentError, NothingPackedError

__all__ = ["HeadQLM", "ModelArgumentError", "NothingPackedError"]

if __name__ == "__main__":
    from headq_ao.evals.lm_eval.__main__ import main

    sys.exit(main())
