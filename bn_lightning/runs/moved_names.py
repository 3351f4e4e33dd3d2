"""Where the modules of version 0.1.0 are now, for messages about files that still name them."""

_MOVED = {
    "batch_norm": "modules.batch_norm",
    "checkpoint_file": "plugins.checkpoint_io",
    "class_swap": "conversion.class_swap",
    "convert": "conversion.convert",
    "fold": "conversion.fold",
    "fusion": "conversion.fusion",
    "layer_sync": "plugins.layer_sync",
    "metrics_logger": "plugins.metrics_logger",
    "mlflow_logger": "plugins.mlflow_logger",
    "no_profiler": "plugins.no_profiler",
    "run_lock": "cli.run_lock",
    "sync": "modules.sync_batch_norm",
    "tracing": "conversion.tracing",
}


def moved_hint(name: str) -> str:
    """Return what to do about a dotted name of version 0.1.0, "" for any other name."""
    package, _, rest = name.partition(".")
    module, _, attribute = rest.partition(".")
    if package != "bn_lightning" or module not in _MOVED:
        return ""
    return (
        f"; bn_lightning 0.1.0 wrote that name: use version 0.1.0, or write"
        f" {package}.{_MOVED[module]}.{attribute}, where version 0.2.0 has it"
    )
