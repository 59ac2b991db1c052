"""Distillation losses against torch's own divergence, and their gradients against finite differences."""

import pytest
import torch
from torch.nn import functional

from bsnas.engine.training.distillation import alpha_divergence, distillation, kl_divergence


def logits(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_is_torchs() -> None:
    student, teacher = logits(0), logits(1)
    wanted = functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
    assert torch.allclose(kl_divergence(student, teacher), wanted)


@pytest.mark.parametrize("name", ["kl", "alpha"])
def test_a_student_like_its_teacher_loses_nothing_and_learns_nothing(name: str) -> None:
    student = logits(0).requires_grad_()
    loss = distillation(name, logits(0))(student)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_where_nothing_is_clipped_the_gradient_is_that_of_the_larger_divergence() -> None:
    student, teacher = logits(0, 0.3).requires_grad_(), logits(1, 0.3)
    q, p = student.softmax(1), teacher.softmax(1)
    assert max((p / q).max().item(), (q / p).max().item()) < 5
    forward, backward = (p * (p / q).log()).sum(1), ((q * q / p).sum(1) - 1) / 2
    assert 0 < (forward > backward).sum() < len(forward)
    torch.maximum(forward, backward).mean().backward()
    wanted, student.grad = student.grad, None
    loss = alpha_divergence(student, teacher)
    assert torch.allclose(loss, torch.maximum(forward, backward).mean())
    loss.backward()
    assert torch.allclose(student.grad, wanted)  # type: ignore[arg-type]


def test_a_student_that_is_sure_of_the_wrong_class_moves_it_no_faster_than_the_clip_allows() -> None:
    student = torch.tensor([[12.0, 0.0]], dtype=torch.float64, requires_grad=True)
    alpha_divergence(student, torch.tensor([[-12.0, 0.0]], dtype=torch.float64)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert 0 < student.grad.abs().max() <= 5
