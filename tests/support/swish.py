"""An autograd function that tests put after a BatchNorm."""

import torch


class Swish(torch.autograd.Function):
    """Reads its input where torch functions cannot see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return dy * s * (1 + x * (1 - s))
