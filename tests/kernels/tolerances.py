"""How far a result may be from the float64 reference, ||out - reference|| / ||reference||, per dtype."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of one operation: a few roundings of its own output and operands."""


def error(out: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN, which never passes, stays NaN."""
    reference = reference.double()
    return float((out.to(reference) - reference).norm() / reference.norm().clamp_min(1e-30))
