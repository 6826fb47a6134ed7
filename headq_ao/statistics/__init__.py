"""What is measured of queries, keys and values: moments, importance, units, rotation to other positions."""

from headq_ao.statistics.moments import LayerMoments

__all__ = ["LayerMoments"]
