"""Fuses BatchNorm with the addition and the activation that follow it, call by call.

    y = act(bn(x))    and    y = act(bn(x) + residual), act(residual + bn(x)), bn(x) + residual

The BatchNorm module does not change: its forward takes the residual and the activation as arguments
of one call, so other callers still get the plain BatchNorm. What changes is the forward of the
module that calls it, which becomes an attribute of that instance:

    nn.Sequential   a forward that checks each pair of consecutive children
    other modules   their own forward, traced (tracing.py), with the calls put together

Each fused call checks at run time what may have changed: hooks, classes of the modules, shape and
dtype of the residual. If fusion is no longer valid, or a trace no longer holds, the original runs.

    fused_call.py   one fused call, or the separate calls
    forwards.py     the forwards that replace a class's forward on an instance
    sites.py        which calls of a graph can be fused safely
    apply.py        a whole model: fuse_model, unfuse_model
"""

from bn_lightning.conversion.fusion.apply import fuse_model, is_fused, unfuse_model

__all__ = ["fuse_model", "is_fused", "unfuse_model"]
