"""What is measured of queries, keys and values: moments, what attention sees of them, units, rotary turns."""

from headq_ao.statistics.moments import LayerMoments

__all__ = ["LayerMoments"]
