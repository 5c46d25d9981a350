"""The benchmarks: the modules of this package that define a `Benchmark` named after themselves."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from llava_sp.eval.base import Benchmark

# As in the papers' tables; what is not named here follows, by name.
ORDER = (
    "vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seedbench", "llava_bench",
    "mmvet", "mmvp", "refcoco", "qbench",
)  # fmt: skip


_FOLDER = Path(__file__).parents[1]


def benchmark_names(folder: Path = _FOLDER) -> list[str]:
    """Names of the benchmarks, in the order of `ORDER`; read from the source, without importing it."""
    names = [path.stem for path in folder.glob("*.py") if _defines_benchmark(path)]
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def load_benchmark(name: str) -> type[Benchmark]:
    """The class of a benchmark. Raises ValueError, listing those there are, for an unknown name."""
    path = _FOLDER / f"{name}.py"
    if not path.is_file() or not _defines_benchmark(path):
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(benchmark_names())}")
    module = importlib.import_module(f"llava_sp.eval.{name}")
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Benchmark)]
    return next(cls for cls in found if vars(cls).get("name") == name)


def _defines_benchmark(path: Path) -> bool:
    """Whether a class in the file says `name = "<name of the file>"`. Raises ValueError for a benchmark of another name."""
    classes = [
        node for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body if isinstance(node, ast.ClassDef)
    ]
    constants: list[dict[str, object]] = []
    for node in classes:
        values = {_target(line): line.value for line in node.body if isinstance(line, (ast.Assign, ast.AnnAssign))}
        constants.append({name: v.value for name, v in values.items() if isinstance(v, ast.Constant)})
    if any(found.get("name") == path.stem for found in constants):
        return True
    for found in constants:
        if {"name", "title"} <= found.keys():
            raise ValueError(f"{path} defines the benchmark {found['name']!r}; name the file {found['name']}.py")
    return False


def _target(line: ast.Assign | ast.AnnAssign) -> str:
    """What a line gives a value to, as it is written."""
    return ast.unparse(line.targets[0] if isinstance(line, ast.Assign) else line.target)
