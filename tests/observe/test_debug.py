"""Debug mode's look at modules: the first that gives what is not finite, in whichever model it was turned to."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from ava_fast.config import load_config
from ava_fast.observe.debug import CloseLook


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, torch.where(x > 0, x, math.inf)


class First(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0] * pair[1]


def model() -> nn.Module:
    return nn.Sequential(OrderedDict(whole=nn.Identity(), broken=Broken(), after=First()))


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) for each in module.modules())


def test_the_innermost_and_first_is_named_once_a_step() -> None:
    look, x, broken = (
        CloseLook(load_config(None, ["training.mode=debug"]).training),
        torch.tensor([1.0, -2, 3]),
        model(),
    )
    with look.at(broken):
        look.begin()
        broken(x)
        assert look.first == "broken: 1 of 3 values are not finite"
        look.begin()
        broken(x.abs())
        assert look.first is None


def test_it_leaves_a_model_that_is_replaced() -> None:
    look, old, new = CloseLook(load_config(None, ["training.mode=debug"]).training), model(), model()
    with look.at(old):
        assert hooks(old) == 4
        look.turn_to(None)
        assert hooks(old) == 0
        look.turn_to(new)
        assert (hooks(old), hooks(new)) == (0, 4)
    look.turn_to(old)  # nobody looks any more
    assert (hooks(old), hooks(new)) == (0, 0)


def test_other_modes_look_at_nothing() -> None:
    look, watched = CloseLook(load_config(None).training), model()
    with look.at(watched):
        assert hooks(watched) == 0
        assert not torch.are_deterministic_algorithms_enabled()
