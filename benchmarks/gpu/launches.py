"""Small launches of every kernel, to be run under compute-sanitizer."""

import torch

from bn_lightning.kernels import batch_norm
from bn_lightning.kernels.layout import as_layout
from bn_lightning.kernels.schedule import Regime, forced_regime
from bn_lightning.kernels.sync_ops import batch_norm_stats

# Not a multiple of any tile, so that every mask is needed; one whose bit mask is whole bytes; rows;
# and channels of several splits.
SHAPES = ((5, 9, 7, 7), (6, 16, 4, 4), (60, 100), (21, 3, 1000))


def launch_all(device: str) -> None:
    """Run forwards and backwards in every regime and layout, in training and in evaluation."""
    for shape in SHAPES:
        for channels_last in (False, True) if len(shape) > 2 else (False,):
            for regime in Regime:
                x, residual, dy = (
                    as_layout(torch.randn(shape, device=device), channels_last) for _ in range(3)
                )
                batch_norm_stats(x, triton=True)
                inputs = [x.requires_grad_(), residual.requires_grad_()]
                weight, bias, mean = (torch.randn(shape[1], device=device) for _ in range(3))
                inputs += [weight.requires_grad_(), bias.requires_grad_()]
                for training in (True, False):
                    with forced_regime(regime):
                        y = batch_norm(
                            x,
                            weight,
                            bias,
                            mean,
                            mean.exp(),
                            training=training,
                            activation="relu",
                            residual=residual,
                            backend="triton",
                        )
                        torch.autograd.grad(y, inputs, dy)
    if device == "cuda":
        torch.cuda.synchronize()
