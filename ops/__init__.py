"""Packed-row operators: plain tensors in, plain tensors out, each beside a reference that defines it."""

from headq_ao.ops.decode_attention.op import (
    ExactRows,
    MappedQuery,
    Rows,
    attend,
    attend_runs,
    decode_attention,
    merge_segments,
)
from headq_ao.ops.encode_keys.op import encode_keys
from headq_ao.ops.encode_values.op import encode_values
from headq_ao.ops.feedback.op import feedback_codes
from headq_ao.ops.feedback.reference import unit_factor

__all__ = [
    "ExactRows",
    "MappedQuery",
    "Rows",
    "attend",
    "attend_runs",
    "decode_attention",
    "encode_keys",
    "encode_values",
    "feedback_codes",
    "merge_segments",
    "unit_factor",
]
