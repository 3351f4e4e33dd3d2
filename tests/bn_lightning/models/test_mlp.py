"""MLP: its modules, their order and names."""

from typing import Any

import pytest
import torch
from torch import nn

from bn_lightning.models.layers import ACTIVATION_MODULES
from bn_lightning.models.mlp import MLP

WIDTHS = [5, 3]


def norm(num_features: int, spatial_dims: int = 0) -> nn.Module:
    return nn.BatchNorm1d(num_features)


def mlp(**options: Any) -> MLP:
    defaults = {
        "in_features": 12,
        "widths": WIDTHS,
        "out_features": 4,
        "activation": "sigmoid",
        "norm": norm,
        "norm_position": "before",
    }
    return MLP(**{**defaults, **options})


def kinds(network: MLP) -> list[list[str]]:
    return [[type(module).__name__ for module in layer] for layer in network.hidden]


class TestOrder:
    @pytest.mark.parametrize(
        ("options", "layer"),
        [
            ({"norm_position": "before"}, ["Linear", "BatchNorm1d", "Sigmoid"]),
            ({"norm_position": "after"}, ["Linear", "Sigmoid", "BatchNorm1d"]),
            ({"norm": None}, ["Linear", "Sigmoid"]),
            ({"norm": None, "norm_position": "after"}, ["Linear", "Sigmoid"]),
        ],
        ids=["before", "after", "none", "none_after"],
    )
    def test_each_hidden_layer(self, options: dict[str, Any], layer: list[str]) -> None:
        assert kinds(mlp(**options)) == [layer, layer]

    @pytest.mark.parametrize("position", ["before", "after"])
    def test_forward_is_that_formula(self, position: str) -> None:
        torch.manual_seed(0)
        network = mlp(widths=[5], norm_position=position)
        linear, bn = network.hidden[0].linear, network.hidden[0].norm
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        x = torch.randn(7, 12) + 1

        def normalized(u: torch.Tensor) -> torch.Tensor:
            mean, var = u.mean(0), u.var(0, correction=0)
            return (u - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias

        u = x @ linear.weight.T + linear.bias
        h = normalized(u).sigmoid() if position == "before" else normalized(u.sigmoid())
        expected = h @ network.output.weight.T + network.output.bias
        torch.testing.assert_close(network(x), expected)

    def test_the_output_is_not_activated_or_normalized(self) -> None:
        network = mlp(activation="relu")
        nn.init.zeros_(network.output.weight)
        nn.init.constant_(network.output.bias, -2.0)
        assert torch.equal(network(torch.randn(3, 12)), torch.full((3, 4), -2.0))


class TestInput:
    def test_input_norm_normalizes_the_flattened_input(self) -> None:
        torch.manual_seed(0)
        network, plain = mlp(input_norm=norm), mlp()
        plain.load_state_dict(network.state_dict(), strict=False)
        x = 5 * torch.randn(7, 3, 4) + 2
        flat = x.flatten(1)
        standard = (flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(network(x), plain(standard))

    def test_none_adds_no_parameters(self) -> None:
        assert (
            mlp(norm=None, input_norm=None).state_dict().keys()
            == mlp(norm=None).state_dict().keys()
        )


class TestShapes:
    @pytest.mark.parametrize("shape", [(6, 12), (6, 1, 3, 4), (6, 3, 4)], ids=str)
    def test_inputs_are_flattened(self, shape: tuple[int, ...]) -> None:
        network = mlp().eval()
        x = torch.randn(shape)
        assert network(x).shape == (6, 4)
        assert torch.equal(network(x), network(x.reshape(6, 12)))

    @pytest.mark.parametrize("widths", [[], [1], [2, 7, 3]], ids=str)
    def test_widths(self, widths: list[int]) -> None:
        network = mlp(widths=widths)
        sizes = [
            (linear.in_features, linear.out_features)
            for linear in network.modules()
            if isinstance(linear, nn.Linear)
        ]
        assert sizes == list(zip([12, *widths], [*widths, 4], strict=True))
        assert network(torch.randn(6, 12)).shape == (6, 4)

    def test_each_norm_has_the_width_of_its_layer(self) -> None:
        calls: list[tuple[int, int]] = []

        def recording(num_features: int, spatial_dims: int = 0) -> nn.Module:
            calls.append((num_features, spatial_dims))
            return nn.Identity()

        mlp(norm=recording)
        assert calls == [(5, 0), (3, 0)]


class TestPaper:
    def test_the_network_of_section_4_1(self) -> None:
        network = MLP(784, [100, 100, 100], 10, "sigmoid", norm, "before")
        assert kinds(network) == [["Linear", "BatchNorm1d", "Sigmoid"]] * 3
        weights = 784 * 100 + 100 + 2 * (100 * 100 + 100) + 100 * 10 + 10
        assert sum(p.numel() for p in network.parameters()) == weights + 3 * 2 * 100
        assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


class TestState:
    def test_weights_are_the_same_with_and_without_norm(self) -> None:
        weights = {
            "hidden.0.linear.weight",
            "hidden.0.linear.bias",
            "hidden.1.linear.weight",
            "hidden.1.linear.bias",
            "output.weight",
            "output.bias",
        }
        assert mlp(norm=None).state_dict().keys() == weights
        extra = {
            f"hidden.{i}.norm.{name}" for i in range(2) for name in nn.BatchNorm1d(1).state_dict()
        }
        for position in ("before", "after"):
            assert mlp(norm_position=position).state_dict().keys() == weights | extra


class TestArguments:
    @pytest.mark.parametrize("name", ACTIVATION_MODULES)
    def test_activations_by_name(self, name: str) -> None:
        function = nn.functional if name != "identity" else None
        network = mlp(activation=name, widths=[6], norm=None)
        x = torch.randn(5, 6)
        expected = x if function is None else getattr(function, name)(x)
        torch.testing.assert_close(network.hidden[0].activation(x), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"widths": [5, 0]},
            {"widths": [-5]},
            {"widths": [2.5]},
            {"widths": ["wide"]},
            {"widths": [True]},
            {"in_features": 0},
            {"out_features": -1},
        ],
        ids=str,
    )
    def test_sizes_are_positive_integers(self, options: dict[str, Any]) -> None:
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"`{name}`.*positive integer") as caught:
            mlp(**options)
        assert repr(value) in str(caught.value)

    def test_unknown_activation(self) -> None:
        with pytest.raises(ValueError, match="`activation`.*sigmoid.*'swoosh'"):
            mlp(activation="swoosh")

    def test_options_of_the_activation(self) -> None:
        network = mlp(activation="leaky_relu", activation_options={"negative_slope": 0.3})
        slopes = [layer.activation.negative_slope for layer in network.hidden]
        assert slopes == [0.3, 0.3]
        assert network.hidden[0].activation is not network.hidden[1].activation

    def test_unknown_option(self) -> None:
        with pytest.raises(ValueError, match="`activation_options`.*leaky_relu.*{'slope': 0.3}"):
            mlp(activation="leaky_relu", activation_options={"slope": 0.3})

    def test_unknown_position(self) -> None:
        with pytest.raises(ValueError, match="`norm_position`.*before or after.*'between'"):
            mlp(norm_position="between")
