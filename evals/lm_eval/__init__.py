"""lm-eval through the packed cache: importing this registers the model ``"headq"`` with lm-eval.

``python -m headq_ao.evals.lm_eval --help`` shows the command line.
"""

import importlib.util

if importlib.util.find_spec("lm_eval") is None:
    raise ModuleNotFoundError("headq_ao.evals.lm_eval needs lm-eval: pip install 'headq_ao[lm-eval]'")

from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.evals.lm_eval.arguments import ModelArgumentError
from headq_ao.evals.lm_eval.model import HeadQLM

__all__ = ["HeadQLM", "ModelArgumentError", "NothingPackedError"]
