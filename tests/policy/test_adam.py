"""GroupStepAdam against torch's AdamW, and the format of its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opo_megatron.policy.adam import GroupStepAdam

SHAPES = [(7, 5), (11,), (3, 2, 4), ()]


def parameters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def groups_of(params: list[Tensor]) -> list[dict[str, object]]:
    """Matrices decay, vectors do not; each group has its own learning rate."""
    matrices = [p for p in params if p.dim() > 1]
    return [
        {"params": matrices, "weight_decay": 0.1, "lr": 3e-3},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0, "lr": 1e-2},
    ]


def set_gradients(params: list[Tensor], step: int) -> None:
    """Gradients of 1e-6 to 1e3, so that ε and the bias correction matter."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        scales = 10 ** (9 * torch.rand(p.shape, generator=generator) - 6)
        p.grad = torch.randn(p.shape, generator=generator) * scales


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_ten_steps_equal_torchs_adamw(betas: tuple[float, float], eps: float) -> None:
    ours, theirs = parameters(), parameters()
    our_adam = GroupStepAdam(groups_of(ours), betas=betas, eps=eps)
    torch_adamw = torch.optim.AdamW(groups_of(theirs), betas=betas, eps=eps)
    for step in range(10):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for optimizer in (our_adam, torch_adamw):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert all(not torch.equal(p, q) for p, q in zip(ours, parameters(), strict=True))


def test_the_first_step_moves_every_element_by_the_learning_rate() -> None:
    """m̂/√v̂ is the gradient's sign at step 1."""
    p = torch.zeros(4, requires_grad=True)
    p.grad = torch.tensor([1e-3, -5.0, 2.0, -1e3])
    GroupStepAdam([p], lr=0.25, eps=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.25, 0.25, -0.25, 0.25]))


def test_the_step_is_stored_per_group_and_the_state_is_two_moments() -> None:
    params = parameters()
    optimizer = GroupStepAdam(groups_of(params))
    optimizer.add_param_group({"params": []})
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3, 3]
    assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for p in params)


def test_a_parameter_without_gradient_is_unchanged_and_has_no_state() -> None:
    params = parameters()
    optimizer = GroupStepAdam(params, weight_decay=0.5)
    set_gradients(params[1:], 0)
    optimizer.step()
    assert torch.equal(params[0], parameters()[0])
    assert params[0] not in optimizer.state


def test_an_optimizer_restored_from_its_state_takes_the_same_steps() -> None:
    straight, first = parameters(), parameters()
    uninterrupted, before = GroupStepAdam(groups_of(straight)), GroupStepAdam(groups_of(first))
    for step in range(4):
        set_gradients(straight, step)
        uninterrupted.step()
    for step in range(2):
        set_gradients(first, step)
        before.step()
    second = [p.detach().clone().requires_grad_() for p in first]
    after = GroupStepAdam(groups_of(second))
    after.load_state_dict(before.state_dict())
    for step in range(2, 4):
        set_gradients(second, step)
        after.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, second, strict=True))


def test_only_decoupled_weight_decay_is_supported() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        GroupStepAdam(parameters(), adam_w_mode=False)
