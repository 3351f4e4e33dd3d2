"""Where the modules of version 0.1.0 are now, for messages about files that still name them."""

import re

_MOVED = {
    "batch_norm": "modules.batch_norm",
    "callbacks.steps": "callbacks.training_loop",
    "checkpoint_file": "plugins.checkpoint_io",
    "class_swap": "conversion.class_swap",
    "convert": "conversion.convert",
    "data.given_images": "data.prediction_images",
    "fold": "conversion.fold",
    "layer_sync": "plugins.layer_sync",
    "metrics_logger": "plugins.metrics_logger",
    "mlflow_logger": "plugins.mlflow_logger",
    "models.convolution": "models.layers",
    "no_profiler": "plugins.no_profiler",
    "run_lock": "cli.run_lock",
    "sync": "modules.sync_batch_norm",
}


def moved_hint(text: str) -> str:
    """Return what to do about the first name of version 0.1.0 in a text, "" if there is none."""
    for name in re.findall(r"\bbn_lightning\.[\w.]+", text):
        for old, new in _MOVED.items():
            if name.startswith(f"bn_lightning.{old}."):
                moved = name.replace(old, new, 1).rstrip(".")
                return (
                    f"; bn_lightning 0.1.0 wrote that name, which is {moved} now: change the name,"
                    " or use version 0.1.0"
                )
    return ""
