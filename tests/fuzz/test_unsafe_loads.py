"""No source of the package reads a pickle, or runs a text, but where it says why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("bn_lightning", "kernels", "sweeps", "examples", "benchmarks", "docs")

# Names whose call, or import, unpickles or runs what a file says.
MODULES = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal", "jsonpickle"}
CALLS = {"torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "pandas.read_pickle"}
CALLS |= {"exec", "eval", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}

KNOWN = {
    # What its own forks wrote into its own temporary folder.
    ("benchmarks/mutation.py", "import pickle"),
}


def unsafe(source: str) -> set[str]:
    """What of a source's text unpickles, or runs what it is given."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.add(f"import {node.module}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            reads = name.endswith(("torch.load", "load_from_checkpoint")) or (
                name.startswith("trainer.") and "ckpt_path" in options
            )
            if (
                (reads and options.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and "allow_pickle" in options)
                or name in CALLS
                or options.get("shell") == "True"
            ):
                found.add(name)
    return found


def test_no_source_loads_what_runs() -> None:
    found = set()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.resolve().is_relative_to(ROOT / folder):
                continue  # a link to a folder that is searched by itself
            names = unsafe(path.read_text(encoding="utf-8"))
            found |= {(str(path.relative_to(ROOT)), name) for name in names}
    assert found == KNOWN


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Classifier.load_from_checkpoint(path)",
        "import pickle",
        "from joblib import load",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "trainer.fit(model, ckpt_path=path)",
        "eval(text)",
    ],
)
def test_they_would_be_found(line: str) -> None:
    assert unsafe(line)


def test_what_is_safe_is_not() -> None:
    assert not unsafe("torch.load(p, weights_only=True); np.load(p); model.eval()")
