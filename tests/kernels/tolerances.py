"""How far a result may be from the float64 reference, ||out - reference|| / ||reference||, per dtype."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of one operation: a few roundings of its own output and operands."""
WORSE_THAN_EAGER = {"each": 4.0, "mean": 1.15}
"""Of a whole block in 16 bits, where ReLU6 masks flip: times eager's error against the same reference, for one result
alone and in the mean over all of them. A flip in one channel that carries most of a norm's gradient makes one result
jump: 0.25 to 3.9 times eager's over seeds and shapes (H100), while the mean was 0.77 to 0.97."""

FLIPS = 3e-2
"""What a handful of flipped masks may weigh in one gradient of the interpreter's small blocks, in any 16-bit type."""


def error(out: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN, which never passes, stays NaN."""
    reference = reference.double()
    return float((out.to(reference) - reference).norm() / reference.norm().clamp_min(1e-30))
