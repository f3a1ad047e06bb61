"""The layers of STYLE.md: an import points downwards, and no module hides another library's."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT_LAYER = 4
LAYERS = {
    "rlhf/__init__.py": 0,
    "rlhf/errors.py": 0,
    "rlhf/paths.py": 0,
    "rlhf/files.py": 0,
    "rlhf/locks.py": 0,
    "rlhf/merge.py": 0,
    "rlhf/masked.py": 0,
    "rlhf/kl.py": 0,
    "rlhf/advantages.py": 0,
    "rlhf/group_advantages.py": 0,
    "rlhf/allocator.py": 0,
    "rlhf/memory.py": 0,
    "rlhf/schedules.py": 0,
    "rlhf/seeds.py": 0,
    "rlhf/reports.py": 0,
    "rlhf/untrusted.py": 1,
    "rlhf/losses/*.py": 0,
    "rlhf/flags.py": 1,
    "rlhf/flag_values.py": 1,
    "rlhf/command_line.py": 1,
    "rlhf/data/*.py": 1,
    "rlhf/trees/*.py": 1,
    "rlhf/models/*.py": 2,
    "rlhf/rollouts.py": 2,
    "rlhf/rewards/*.py": 2,
    "rlhf/pairwise.py": 2,
    "rlhf/experiment/*.py": 3,
    "rlhf/evaluation.py": 3,
    "rlhf/experience.py": 3,
    "rlhf/monitoring.py": 3,
    "rlhf/guards.py": 3,
    "rlhf/rlhf_*.py": SCRIPT_LAYER,
}
"""Every module's layer; a module that matches no row fails the test: give it one."""

ALLOWED = {
    0: {"torch"},
    1: {
        "datasets",
        "httpx",
        "huggingface_hub",
        "matplotlib",
        "numpy",
        "pyarrow",
        "safetensors",
        "simple_parsing",
        "tokenizers",
        "tqdm",
        "transformers",
        "xxhash",
    },
    2: {"llvmlite", "numba", "peft"},
    3: {"lightning", "torchmetrics"},
    SCRIPT_LAYER: set(),
}
"""What each layer may import besides the standard library and what the layers below it may."""

TOKENIZERS_ONLY = ("AutoTokenizer", "PreTrainedTokenizer")
"""Beginnings of the names that layer 1 may take from transformers: tokenizers, but no model."""

FABRIC = ("lightning.fabric", "lightning.pytorch.loggers")
"""What may be used of lightning: Fabric, and the one logger that Fabric has no version of."""

NEVER_IMPORTED = ("data_prep", "demos", "experiments", "tests")


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name or "") of every import statement in a file, wherever it stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }  # never run: they order nothing
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write the module's full name"
            for alias in node.names:
                yield node.module, alias.name


def layer_of(file: str) -> int | None:
    return next((layer for pattern, layer in LAYERS.items() if fnmatch(file, pattern)), None)


def file_of(root: Path, module: str, name: str) -> str | None:
    """The file in the package that `from module import name` reads; None outside the package."""
    if module.partition(".")[0] != "rlhf":
        return None
    base = root / module.replace(".", "/")
    candidates = [base / f"{name}.py", base.with_suffix(".py"), base / "__init__.py"]
    found = next((path for path in candidates if path.is_file()), None)
    assert found, f"{module} is not in the package"
    return found.relative_to(root).as_posix()


def faults(root: Path) -> list[str]:
    """Every breach of the layers under `root`."""
    found, graph = [], {}
    for path in sorted((root / "rlhf").rglob("*.py")):
        file = path.relative_to(root).as_posix()
        layer = layer_of(file)
        if layer is None:
            found.append(f"{file} is missing from the table of layers")
            continue
        allowed = set().union(*(ALLOWED[below] for below in range(layer + 1)))
        graph[file] = set()
        for module, name in imports_of(path):
            top, target = module.partition(".")[0], file_of(root, module, name)
            if target is not None:
                graph[file].add(target)
                if (layer_of(target) or 0) > layer:
                    found.append(f"{file} (layer {layer}) imports {target} (layer {layer_of(target)})")
                if layer == layer_of(target) == SCRIPT_LAYER:
                    found.append(f"{file} imports another script, {target}")
            elif top in NEVER_IMPORTED or (top not in sys.stdlib_module_names and top not in allowed):
                found.append(f"{file} (layer {layer}) imports {module}")
            elif top == "lightning" and not module.startswith(FABRIC):
                found.append(f"{file} imports {module}; of lightning, Fabric alone is used")
            if layer == 1 and top == "transformers" and not name.startswith(TOKENIZERS_ONLY):
                found.append(f"{file} (layer 1) takes {name or module} from transformers")
    list(TopologicalSorter(graph).static_order())
    return found


def shadowing(root: Path) -> list[str]:
    """Modules directly under rlhf/, which `python rlhf/rlhf_dpo.py` puts first on sys.path, that hide a library."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    return [p.name for p in (root / "rlhf").iterdir() if p.stem in taken - {"rlhf"} and not p.stem.startswith("__")]


def test_imports_point_downwards():
    """No upward import, no import outside a layer's libraries, no script that imports a script, no module untabled."""
    assert faults(ROOT) == []


def test_no_module_is_named_like_a_library():
    assert shadowing(ROOT) == []


def test_preparation_uses_the_lower_layers_alone():
    for path in (ROOT / "data_prep").rglob("*.py"):
        for module, name in imports_of(path):
            target = file_of(ROOT, module, name)
            assert target is None or layer_of(target) <= 1, f"{path} imports {target}"


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("rlhf/losses/x.py", "from rlhf.data import splits", "imports rlhf/data/splits.py"),
        ("rlhf/masked.py", "def f():\n    import numpy", "imports numpy"),
        ("rlhf/trees/x.py", "from transformers import AutoModel", "takes AutoModel"),
        ("rlhf/models/x.py", "import lightning.fabric", "imports lightning.fabric"),
        ("rlhf/evaluation.py", "from lightning.pytorch import Trainer", "imports lightning.pytorch;"),
        ("rlhf/rlhf_new.py", "from rlhf.rlhf_dpo import main", "imports another script"),
        ("rlhf/evaluation.py", "import demos.chat", "imports demos.chat"),
        ("rlhf/helpers.py", "", "missing from the table"),
    ],
)
def test_the_check_notices(tmp_path, file, source, complaint):
    for name in ("rlhf/data/splits.py", "rlhf/rlhf_dpo.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source if name == file else "")
    (found,) = faults(tmp_path)
    assert complaint in found


@pytest.mark.parametrize("name", ["datasets.py", "queue.py", "tokenizers"])
def test_the_check_notices_a_shadow(tmp_path, name):
    (tmp_path / "rlhf").mkdir()
    (tmp_path / "rlhf" / name).touch()
    assert shadowing(tmp_path) == [name]
