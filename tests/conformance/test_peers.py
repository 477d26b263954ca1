"""Where TRL, Liger and torchtune mean the definition they give its number; where docs/losses.md says that they do not, they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.cases import N, V, draw, signal_of
from limbeck.objectives import Logits
from limbeck.objectives.head import target_of
from limbeck.objectives.support import Dense

U, Z = draw(N, V, seed=1).float(), draw(N, V, seed=2).float()


def ours(temperature: float = 1.0, **divergence: Any) -> Tensor:
    term = Logits(divergence=divergence, temperature=temperature)
    return term.values(Dense(Z), target_of(signal_of("dense", U.double()), slice(None)), torch.zeros(N, dtype=torch.long)).sum()


def trl(beta: float, temperature: float = 1.0) -> Tensor:
    gkd = pytest.importorskip("trl.experimental.gkd")
    return gkd.GKDTrainer.generalized_jsd_loss(Z[None], U[None], beta=beta, temperature=temperature, reduction="sum")


def liger(beta: float, temperature: float = 1.0) -> Tensor:
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    return jsd.LigerFusedLinearJSDFunction.distillation_loss_fn(Z / temperature, U / temperature, beta=beta)


@pytest.mark.parametrize("peer", [trl, liger])
def test_the_same_at_temperature_1(peer: Any) -> None:
    torch.testing.assert_close(peer(0.0), ours(type="forward_kl"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(peer(1.0), ours(type="reverse_kl"), rtol=1e-4, atol=1e-5)
    for beta in (0.1, 0.5, 0.8):
        torch.testing.assert_close(peer(beta), ours(type="jsd", beta=beta), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peer", [trl, liger])
def test_their_sweep_of_beta_jumps_and_their_temperature_has_no_factor(peer: Any) -> None:
    assert peer(1e-3) < 0.1 * peer(0.0)
    torch.testing.assert_close(ours(type="jsd", beta=1e-3, normalize=True), ours(type="forward_kl"), rtol=0.05, atol=0)
    torch.testing.assert_close(4 * peer(0.5, 2.0), ours(2.0, type="jsd"), rtol=1e-4, atol=1e-5)


def test_torchtunes_forward_kl_lacks_the_teachers_entropy_and_has_the_gradient() -> None:
    kd = pytest.importorskip("torchtune.modules.loss.kd_losses", exc_type=ImportError)
    student, labels = Z.clone().requires_grad_(), torch.zeros(N, dtype=torch.long)
    theirs = kd.ForwardKLLoss()(student, U, labels, normalize=False)
    log_p = torch.log_softmax(U, -1)
    entropy = -(log_p.exp() * log_p).sum()
    torch.testing.assert_close(theirs - entropy, ours(type="forward_kl"), rtol=1e-4, atol=1e-5)
    assert entropy > 1
    (grad,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(grad, torch.softmax(Z, -1) - log_p.exp(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kd.ForwardKLLoss()(student, U, labels) * N, theirs, rtol=1e-5, atol=1e-5)
