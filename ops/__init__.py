"""Operators over packed tokens: plain tensors in, plain tensors out, each beside a reference that defines it."""

from headq_ao.ops.cache_update.op import cache_update, plan_update
from headq_ao.ops.encode.op import quantize
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.error_feedback.op import feedback_codes
from headq_ao.ops.error_feedback.reference import ldl_factor
from headq_ao.ops.paged_attention.op import paged_attention, plan_attention

__all__ = [
    "Encoder",
    "cache_update",
    "feedback_codes",
    "ldl_factor",
    "paged_attention",
    "plan_attention",
    "plan_update",
    "quantize",
]
