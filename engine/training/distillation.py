"""Losses by which the sandwich's smaller networks learn from the largest one (in-place distillation).

All take logits [N, classes], float32, of student and teacher, and give the mean over images [].
"""

from collections.abc import Callable

import torch
from torch import Tensor

ALPHAS = (-1.0, 1.0)
"""The two alphas of which each image takes the one with the larger divergence (AlphaNet, section 4.1)."""
RATIO_MOST = 5.0
"""What importance ratios are clipped at (AlphaNet, section 4.2)."""


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), as in BigNAS (arXiv 2003.11142) and slimmable networks (arXiv 1903.05134)."""
    wanted = teacher.log_softmax(1)
    return (wanted.exp() * (wanted - student.log_softmax(1))).sum(1).mean()


def alpha_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """AlphaNet's adaptive, clipped alpha-divergence (arXiv 2102.07954, equations 7 to 9).

    With p of the teacher and q of the student, D_a = E_q[(p/q)^a - 1] / (a (a - 1)), in the limit KL(p || q) for a = 1.
    A negative alpha punishes a student that is surer than its teacher, a positive one that misses what the teacher
    holds possible; the larger of the two counts. Its gradient is -E_q[(p/q)^a grad log q] / a, in which the
    ratio is clipped.
    """
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    q = log_q.detach().exp()
    divergences, losses = [], []
    for alpha in ALPHAS:
        ratio = (alpha * (log_p - log_q.detach())).exp().clamp(max=RATIO_MOST)
        if alpha == 1:
            divergences.append((log_p.exp() * (log_p - log_q.detach())).sum(1))
        else:
            divergences.append((q * (ratio - 1)).sum(1) / (alpha * (alpha - 1)))
        losses.append(-(q * ratio * log_q).sum(1) / alpha)
    value, chosen = torch.stack(divergences, 1).max(1)
    loss = torch.stack(losses, 1).gather(1, chosen[:, None])[:, 0]
    return (value + loss - loss.detach()).mean()  # the divergence, with the clipped gradient


def distillation(name: str, teacher: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of a student's logits by the divergence of that name, `kl` or `alpha`, from a teacher's."""
    divergence = {"kl": kl_divergence, "alpha": alpha_divergence}[name]
    return lambda student: divergence(student, teacher)
