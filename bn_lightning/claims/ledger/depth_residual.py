"""Whether a deep residual network explodes without BatchNorm, and with SkipInit in its place."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bn_lightning.claims.design import Claim, Condition, Curves, Setting
from bn_lightning.claims.measured_network import MeasuredNetwork
from bn_lightning.claims.probes import accuracy_curves, growth, numbers_of_depth
from bn_lightning.claims.registry import register_claim
from bn_lightning.claims.settings import at_depths
from bn_lightning.models.layers import check_positive_integers
from bn_lightning.models.normalization import NormFactory

_WIDTH, _DEPTH = 50, 64
_BATCH = 256
_GROWTH, _SHARE, _DEEPER = 1.2, 10.0, 2.0  # what the rule asks for, times


class ResidualMLP(nn.Module):
    """Linear layer, residual blocks of one linear layer each, linear output: (N, ...) -> (N, K).

    A block computes x + s * linear(relu(norm(x))), and the output linear(relu(norm(x))).

    Args:
        in_features: number of values in one flattened input.
        width: number of units of each hidden layer.
        depth: number of blocks.
        out_features: number of units of the output layer.
        norm: builds the normalizations; None for none.
        skip_init: whether s is a parameter of each block that starts at 0; else s = 1.
        input_norm: builds the normalization of the flattened input; None for none.

    Raises:
        ValueError: a size is not a positive integer.

    Source: De & Smith 2020, arXiv 2002.10444, sections 2 and 3.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int,
        norm: NormFactory | None,
        skip_init: bool,
        input_norm: NormFactory | None = None,
    ) -> None:
        check_positive_integers(
            in_features=in_features, width=width, depth=depth, out_features=out_features
        )
        super().__init__()
        first = nn.Linear(in_features, width)
        norms = () if input_norm is None else (input_norm(in_features),)
        self.input = nn.Sequential(nn.Flatten(), *norms, first)
        self.blocks = nn.Sequential(*(_Block(width, norm, skip_init) for _ in range(depth)))
        self.output = _branch(width, out_features, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.blocks(self.input(x)))


class _Block(nn.Module):
    def __init__(self, width: int, norm: NormFactory | None, skip_init: bool) -> None:
        super().__init__()
        self.branch = _branch(width, width, norm)
        self.scale = nn.Parameter(torch.zeros(())) if skip_init else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return x + (y if self.scale is None else self.scale * y)


def _branch(width: int, outputs: int, norm: NormFactory | None) -> nn.Sequential:
    layers = [nn.ReLU(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers if norm is None else (norm(width), *layers))


def _settings(budget: str) -> Mapping[str, Setting]:
    depths, rates, steps = {
        "quick": ((4, 32), (1e-4, 0.01, 0.1), 300),
        "full": ((4, 8, 16, 32, _DEPTH, 128), (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0), 1000),
    }[budget]
    probed = sorted({*depths, _DEPTH})
    return at_depths("model.network.depth={}".format, probed, depths, rates, steps)


def _measure(network: MeasuredNetwork) -> Mapping[str, float]:
    if network.directory is not None:
        return {"accuracy": network.metrics["test/accuracy"]}
    model = network.model()
    own = model.network.train()
    x, target = network.batch(_BATCH)
    states = [own.input(x)]
    for block in own.blocks:
        states.append(block(states[-1]))
    gradients = torch.autograd.grad(model.loss(own.output(states[-1]), target), states)
    # In fp64, because squares of what has grown overflow in fp32.
    before, after = (state.detach().double() for state in states[-2:])
    return {
        "growth": growth([float(gradient.double().norm()) for gradient in gradients]),
        "branch": float((after - before).var(0).sum() / after.var(0).sum()),
    }


register_claim(
    Claim(
        name="depth_residual",
        sentence="In a residual network BatchNorm keeps activations and gradients from exploding, "
        "and so deeper networks train.",
        source="De & Smith 2020, arXiv 2002.10444: it makes the branch of block k smaller than "
        "the skip connection by √k. Against: the same, SkipInit does it without BatchNorm",
        base=(
            "model.network._target_=bn_lightning.claims.ledger.depth_residual.ResidualMLP",
            *(f"~model.network.{key}" for key in ("widths", "activation", "activation_options")),
            "~model.network.norm_position",
            f"+model.network.width={_WIDTH}",
            f"+model.network.depth={_DEPTH}",
            "+model.network.skip_init=false",
            "init=he",
        ),
        arms={
            "batch": ("norm=batch",),
            "none": ("norm=none",),
            "SkipInit": ("norm=none", "model.network.skip_init=true"),
        },
        settings=_settings,
        measure=_measure,
        numbers=partial(numbers_of_depth, depth=_DEPTH),
        conditions=(
            Condition(
                "the gradient grows less a block, at the start",
                "growth",
                "none",
                "batch",
                kind="ratio",
                least=_GROWTH,
                unit="times as much a block without BatchNorm",
            ),
            Condition(
                "the last branch is smaller beside the skip connection, at the start",
                "branch",
                "none",
                "batch",
                kind="ratio",
                least=_SHARE,
                unit="times the share without BatchNorm",
            ),
            Condition(
                "the largest depth that trains is larger",
                "largest depth",
                "batch",
                "none",
                kind="ratio",
                least=_DEEPER,
                unit="times as deep",
            ),
            Condition(
                "the gradient grows less with SkipInit",
                "growth",
                "none",
                "SkipInit",
                kind="ratio",
                least=_GROWTH,
                unit="times as much a block without BatchNorm",
                is_control=True,
            ),
            Condition(
                "with SkipInit networks as deep train",
                "largest depth",
                "SkipInit",
                "batch",
                kind="ratio",
                least=1.0,
                unit="times the depth with BatchNorm",
                is_control=True,
            ),
        ),
        curves=(
            Curves(
                "growth", "growth of the gradient\na block", "residual blocks", x_scale="linear"
            ),
            Curves(
                "branch",
                "variance of the last branch\n/ of its sum with the skip",
                "residual blocks",
                x_scale="linear",
            ),
            accuracy_curves("residual blocks", "linear"),
        ),
        not_varied=f"Width {_WIDTH}, one linear layer a block, BatchNorm and ReLU before it, He "
        f"initialization, plain SGD. Growth and share are those of {_DEPTH} blocks. A depth trains "
        "if it reaches a test accuracy of .90 at one of the rates; without BatchNorm the smallest "
        "of them limits the depth.",
        would_change="Smaller rates and more steps without BatchNorm; branches that are scaled "
        "down at the start, as SkipInit does; blocks with the ReLU after the addition.",
        least_steps=50,
        network=ResidualMLP,
    )
)
