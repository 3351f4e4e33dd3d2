"""One rank of a gloo process group: a script that runs the functions the fixture `ranks` sends,
until it is killed.

A function comes as the file that defines it and its name, with its arguments; what it returns, or
the traceback of what it raised, goes back.
"""

import functools
import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist


@functools.cache
def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ranks_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(rank: str, world_size: str, store: str) -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a test prints must not lie between the answers.
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, int(world_size)),
        rank=int(rank),
        world_size=int(world_size),
        # Also how long the last rank may take to start.
        timeout=timedelta(seconds=60),
    )
    while True:
        path, name, arguments = pickle.load(requests)
        if "triton.runtime.interpreter" in sys.modules:  # as in tests/conftest.py
            importlib.import_module("quick_interpreter").speed_up_interpreter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answer = (True, getattr(_load(path), name)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
