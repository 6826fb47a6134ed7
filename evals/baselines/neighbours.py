"""All baselines, registered: those of :mod:`~.methods`, and the systems that stand nearest to HeadQ."""

from headq_ao.evals.baselines import eviction, kvlinc, methods, residual_vq, side_code, trellis, vllm_types

NEIGHBOURS = tuple(
    factory.__name__
    for factory in (
        kvlinc.kvlinc,
        kvlinc.kvlinc_base,
        eviction.rdkv,
        eviction.random_eviction,
        residual_vq.residual_vq,
        trellis.trellis,
        side_code.side_code,
    )
)
ALL = (*methods.METHODS, *NEIGHBOURS, *vllm_types.TYPES)
