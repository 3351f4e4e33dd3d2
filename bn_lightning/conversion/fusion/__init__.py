"""BatchNorm fused with the addition and the activation that follow it, where it is called.

    y = act(bn(x))    and    y = act(bn(x) + residual), act(residual + bn(x)), bn(x) + residual

The module's state stays as it is: its forward takes the residual and the activation for one call,
so that whoever else calls it gets the plain BatchNorm. What changes is the forward that calls it,
which becomes an attribute of that instance:

    nn.Sequential   a forward that looks at two children at a time, whichever they are by then
    other modules   their own forward, recorded (tracing.py), with the calls put together

Each fused call looks again, when it runs, at what may have changed since: hooks, the classes of
the modules, shape and dtype of the residual. Where they do not allow it, and where a recording no
longer holds, the original runs.

Reading order:

    calls.py     one call of a BatchNorm with what follows it, or one after the other
    forwards.py  the forwards that take the place of a class's, on one instance
    sites.py     where in a graph calls can be put together, and where that would not be safe
    apply.py     a whole model: fuse and unfuse
"""

from bn_lightning.conversion.fusion.apply import fuse, is_fused, unfuse

__all__ = ["fuse", "is_fused", "unfuse"]
