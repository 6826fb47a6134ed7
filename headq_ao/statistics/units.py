"""Units in which rows are stored: scales, zeros and means take 16 bits, and fp16 ends at 65504."""

import torch
from torch import Tensor

PLAIN = (2.0**-8, 2.0**8)  # RMS of rows that are stored as they are; fp16 leaves two decades at either end


def unit_of(rms: Tensor) -> Tensor:
    """A power of two for each RMS, fp32: the rows divided by it have one of 0.5 to 1; 1 where it is within
    :data:`PLAIN`, zero or not finite.

    By a power of two codes do not change, bit for bit.

    Example:
        >>> import torch
        >>> from headq_ao.statistics.units import unit_of
        >>> unit_of(torch.tensor([0.0, 1e-6, 0.3, 40.0, 1e5])).tolist()
        [1.0, 1.9073486328125e-06, 1.0, 1.0, 131072.0]
    """
    plain = ~torch.isfinite(rms) | (rms == 0) | ((rms >= PLAIN[0]) & (rms <= PLAIN[1]))
    bounded = torch.where(plain, 1.0, rms.clamp(2.0**-100, 2.0**100))
    return torch.where(plain, 1.0, bounded / torch.frexp(bounded).mantissa).float()


def unit_of_rows(x: Tensor) -> Tensor | None:
    """The unit of rows ``[B, H, n, D]`` for each sequence and head, ``[B, H, 1]``; None where all are 1."""
    if x.is_meta:
        return None
    rms = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64) / max(x.shape[-2] * x.shape[-1], 1) ** 0.5
    return unless_plain(unit_of(rms)[..., None])


def unless_plain(unit: Tensor) -> Tensor | None:
    """The unit, or None where it is 1 throughout."""
    return None if bool((unit == 1).all()) else unit
