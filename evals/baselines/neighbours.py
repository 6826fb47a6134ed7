"""All baselines, registered: those of :mod:`~.methods`, and the systems that stand nearest to HeadQ."""

from headq_ao.evals.baselines import methods, residual_vq, trellis

NEIGHBOURS = (residual_vq.residual_vq.__name__, trellis.trellis.__name__)
ALL = (*methods.METHODS, *NEIGHBOURS)
