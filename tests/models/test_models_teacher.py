"""Teachers: what is averaged, what is left alone, and which of their norms gather statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patchmine.models.teacher import Teacher


def student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("own_statistics", [False, True])
def test_parameters_are_averaged_and_buffers_are_not(own_statistics: bool) -> None:
    mine = student()
    teacher = Teacher(own_statistics=own_statistics, net=mine)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.add_(1.0)
        mine(torch.randn(8, 3, 2, 2))
    teacher.update(0.9, net=mine)
    for name, _ in mine.named_parameters():
        torch.testing.assert_close(teacher.state_dict()[f"net.{name}"], before[f"net.{name}"] + 0.1)
    for name, _ in mine.named_buffers():
        assert torch.equal(teacher.state_dict()[f"net.{name}"], before[f"net.{name}"]), name
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_its_norms_see_its_own_batch_and_nothing_else_trains() -> None:
    method = nn.Module()
    method.teacher = Teacher(own_statistics=True, net=student())
    net = method.teacher.get_submodule("net")
    images = torch.randn(8, 3, 2, 2)
    method.train()
    assert [part.training for part in net] == [False, True, False, False]
    first, norm = net[0](images), net[1]
    expected = (first - first.mean((0, 2, 3), keepdim=True)) / (
        first.var((0, 2, 3), False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(net(images), net[3](expected))
    torch.testing.assert_close(norm.running_mean, 0.1 * first.mean((0, 2, 3)))
    method.eval()
    assert not any(module.training for module in method.teacher.modules())
    gathered = norm.running_mean.clone()
    net(images)
    assert torch.equal(norm.running_mean, gathered)


def test_without_being_asked_it_stays_in_eval_mode() -> None:
    teacher = Teacher(net=student()).train()
    assert not any(module.training for module in teacher.modules())
