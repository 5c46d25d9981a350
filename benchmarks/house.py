"""Measures the structure of the package from its syntax trees: size, imports, import cycles, and the share of guard lines.

    python benchmarks/house.py [--root llava_sp] [--files 20] [--trips]

Imports inside functions count, and so do names of our modules in strings, but for `python -m MODULE`; imports for types alone do
not. A guard line is one of a `raise`, of an `if` whose body ends with one, of an `except` that ends with one, or of a function
named check* or expect*.

`--trips` runs three journeys and counts through how many modules they lead: `modules`, `stays` (how often one module's code is
entered from another's) and `returns` (entries into a module that was left before); each function counts once. Two, three and
four calls deep is what a reader follows; the last column is every call below. `tests/test_design.py` asserts
the zeros.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

# A part of the package -> the parts that it may import, from the ground up.
_GROUND = {"common", "decoding", "model"}
_DATA = {*_GROUND, "config", "checkpoints"}
_USERS = {*_DATA, "data"}
DIRECTIONS = {
    "common": set(),
    "decoding": set(),
    "model": set(),
    "config": _GROUND,
    "checkpoints": _GROUND,
    "data": _DATA,
    "inference": _USERS,
    "train": _USERS,
    "shapes": _USERS,
    "eval": {*_USERS, "inference"},
    "generate": {*_USERS, "inference"},
    "": {"model", "checkpoints", "_auto"},  # the package itself: names are resolved on first use
    "_auto": {"model", "checkpoints"},
}
# What `from llava_sp import NAME` loads.
EXPORTS = {
    "LlavaSPConfig": ["llava_sp.model.configuration_llava_sp"],
    "LlavaSPForCausalLM": ["llava_sp.model.modeling_llava_sp", "llava_sp.checkpoints.opening"],
    "LlavaSPModel": ["llava_sp.model.modeling_llava_sp", "llava_sp.checkpoints.opening"],
    "LlavaSPProcessor": ["llava_sp.model.processing_llava_sp", "llava_sp.checkpoints.opening"],
}


class House:
    """The modules of the package below `root`.

    Attributes:
        paths: module name -> file.
        edges: module -> the modules of ours that it imports.
        private: "module: name" of every `_name` that is imported from another module.
        guards: file -> its guard lines.
    """

    def __init__(self, root: Path):
        self.root = root
        package = root.name
        self.paths: dict[str, Path] = {}
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            self.paths[".".join(parts).removesuffix(".__init__")] = path
        self.edges: dict[str, set[str]] = defaultdict(set)
        self.private: list[str] = []
        self.guards: dict[Path, int] = {}
        for name, path in self.paths.items():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            self._read_imports(name, path, tree)
            self.guards[path] = len(guard_lines(tree))

    def _read_imports(self, name: str, path: Path, tree: ast.Module) -> None:
        for_types = {id(node) for block in ast.walk(tree) if _is_for_types(block) for node in ast.walk(block)}
        commands = _command_modules(tree)
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found = _imported(name, path.name == "__init__.py", node)
                own = isinstance(node, ast.ImportFrom) and found and found[0].startswith(self.root.name)
                if own and not name.endswith("__init__"):
                    leaves = [alias.name for alias in node.names if alias.name.startswith("_")]
                    self.private += [
                        f"{name}: {leaf}" for leaf in leaves if leaf != "_auto" and not leaf.startswith("__")
                    ]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in commands:
                found = [node.value] if re.fullmatch(rf"{self.root.name}(\.\w+)+", node.value) else []
            else:
                continue
            for one in found:
                target = self._module(one)
                if target and target not in (name, self.root.name) and not name.startswith(f"{target}."):
                    self.edges[name].add(target)

    def _module(self, name: str) -> str | None:
        """The module that a dotted name lies in, or None for one of another package."""
        while name and name not in self.paths:
            name = name.rpartition(".")[0]
        return name or None

    def part(self, module: str) -> str:
        """The folder or module at the top of the package that a module belongs to; "" for the package itself."""
        return module.partition(".")[2].partition(".")[0]

    @property
    def lines(self) -> int:
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in self.paths.values())

    @property
    def guard_share(self) -> float:
        """Percent of all lines."""
        return 100 * sum(self.guards.values()) / self.lines

    def wrong_directions(self) -> list[str]:
        """Imports that `DIRECTIONS` does not allow."""
        return [
            f"{module} -> {target}"
            for module, targets in sorted(self.edges.items())
            for target in sorted(targets)
            if self.part(target) not in {*DIRECTIONS[self.part(module)], self.part(module)}
        ]

    def circles(self) -> list[list[str]]:
        """Groups of modules that import each other (Tarjan's strongly connected components)."""
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        found = []

        def visit(module: str) -> None:
            index[module] = low[module] = len(index)
            stack.append(module)
            for target in self.edges[module]:
                if target not in index:
                    visit(target)
                if target in stack:
                    low[module] = min(low[module], low[target])
            if low[module] == index[module]:
                at = stack.index(module)
                group, stack[at:] = stack[at:], []
                if len(group) > 1:
                    found.append(sorted(group))

        for module in list(self.paths):
            if module not in index:
                visit(module)
        return found

    def benchmarks(self) -> dict[str, int]:
        """Module in eval/ that defines a benchmark of its own name -> its lines."""
        found = {}
        for path in sorted((self.root / "eval").glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if re.search(rf'^    name = "{path.stem}"', text, re.MULTILINE):
                found[path.stem] = len(text.splitlines())
        return found


def guard_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        end = None
        if isinstance(node, ast.Raise):
            end = node.end_lineno
        elif isinstance(node, ast.If):
            plain = all(isinstance(line, (ast.Raise, ast.Assign, ast.Expr)) for line in node.body)
            end = node.body[-1].end_lineno if plain and isinstance(node.body[-1], ast.Raise) else None
        elif isinstance(node, ast.ExceptHandler):
            end = node.end_lineno if isinstance(node.body[-1], ast.Raise) else None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and re.match(r"_?(check|expect)", node.name):
            end = node.end_lineno
        if end is not None:
            lines |= set(range(node.lineno, end + 1))
    return lines


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _command_modules(tree: ast.Module) -> set[int]:
    """The strings behind a "-m": modules that run in a process of their own."""
    found = set()
    for node in ast.walk(tree):
        items = (
            node.elts if isinstance(node, (ast.List, ast.Tuple)) else node.args if isinstance(node, ast.Call) else []
        )
        for before, item in itertools.pairwise(items):
            if isinstance(before, ast.Constant) and before.value == "-m":
                found.add(id(item))
    return found


def _imported(module: str, is_package: bool, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Dotted names that a statement imports, the module's own first."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = module.split(".") if is_package else module.split(".")[:-1]
        base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
    if base == "llava_sp":
        return [name for alias in node.names for name in EXPORTS.get(alias.name, [f"{base}.{alias.name}"])]
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


# ---- trips


class Trip:
    """Counts the modules of the package that a call leads through."""

    DEPTHS = (2, 3, 4, None)

    def __init__(self, package: str = "llava_sp"):
        self.package = package
        self._entered: list[tuple[int, str]] = []  # how many calls of ours deep, module
        self._seen: set[object] = set()

    def __enter__(self) -> Trip:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _is_ours(self, frame) -> bool:
        ours = frame.f_globals.get("__name__", "").startswith(f"{self.package}.")
        return ours and not frame.f_code.co_name.startswith("<")

    def _event(self, frame, event: str, argument: object) -> None:
        if event != "call" or frame.f_code in self._seen or not self._is_ours(frame):
            return
        self._seen.add(frame.f_code)
        depth, outer = 0, frame.f_back
        while outer is not None:
            depth, outer = depth + self._is_ours(outer), outer.f_back
        self._entered.append((depth, frame.f_globals["__name__"]))

    def count(self, deepest: int | None) -> tuple[int, int, int]:
        """Modules, stays and returns of the calls up to a depth."""
        names = [name for depth, name in self._entered if deepest is None or depth <= deepest]
        stays = [name for name, _ in itertools.groupby(names)]
        return len(set(stays)), len(stays), len(stays) - len(set(stays))

    def __str__(self) -> str:
        return "".join("{:8}{:5}{:5}".format(*self.count(depth)) for depth in self.DEPTHS)


TRIPS = {
    "opening a released LoRA folder": """
from llava_sp import LlavaSPForCausalLM
keyword = "language_model" if (root / "common").is_dir() else "base_model"
bases = {keyword: "tests/golden/base", "vision_tower": "tests/golden/clip"}
with trip:
    LlavaSPForCausalLM.from_pretrained("tests/golden/checkpoint_cropping/lora", **bases)
""",
    "setting up a run": """
import yaml
from transformers import Trainer
try: from llava_sp.train.run import main
except ImportError: from llava_sp.train.__main__ import main
golden = root.parent / "tests/golden"
settings = {"base": str(root.parent / "configs/finetune_lora.yaml"), "language_model": str(golden / "base"),
    "vision_tower": str(golden / "clip"), "spatial_width": 5, "data_path": str(golden / "samples/data.json"),
    "image_folder": str(golden / "samples/images"), "projector_checkpoint": "scratch", "bf16": False, "deepspeed": None,
    "global_batch_size": 2, "per_device_train_batch_size": 1, "max_steps": 1, "output_dir": folder + "/out"}
Path(folder, "run.yaml").write_text(yaml.safe_dump(settings))
class Arrived(Exception): pass
def arrive(*args, **kwargs): raise Arrived
Trainer.train = arrive
with trip:
    try: main(["--config", folder + "/run.yaml"])
    except Arrived: pass
""",
    "python -m llava_sp.eval.vqav2": """
from llava_sp.shapes.make import main as make
from llava_sp.eval.vqav2 import VQAv2, main
make(["--output", folder + "/data", "--questions", "4", "--captions", "1", "--conversations", "1"])
words = ["--model", str(root / "shapes/model"), "--data", folder + "/data/vqav2", "--output", folder + "/out"]
with trip:
    assert main(VQAv2, [*words, "--limit", "1", "--max-new-tokens", "1"]) == 0
""",
}


def measure_trips(root: Path) -> None:
    depths = "".join(f"{f'{depth} calls deep' if depth else 'every call':>18}" for depth in Trip.DEPTHS)
    print(f"{'modules, stays, returns':32} {depths}")
    for name, code in TRIPS.items():
        setup = f"""
import sys, tempfile, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("house", {str(Path(__file__).resolve())!r})
house = importlib.util.module_from_spec(spec); spec.loader.exec_module(house)
root, folder, trip = Path({str(root.resolve())!r}), tempfile.mkdtemp(), house.Trip()
"""
        done = subprocess.run(
            [sys.executable, "-c", setup + code + "print(trip)"],
            cwd=root.resolve().parent,
            capture_output=True,
            text=True,
        )
        print(f"{name:32} {(done.stdout if done.returncode == 0 else done.stderr).rstrip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("llava_sp"), help="the package's folder")
    parser.add_argument("--files", type=int, default=10, help="how many of the files with most guard lines to list")
    parser.add_argument("--trips", action="store_true", help="also run and count the trips")
    args = parser.parse_args()
    house = House(args.root)
    sizes, guards = Counter(), Counter()
    for module, path in house.paths.items():
        sizes[house.part(module)] += len(path.read_text(encoding="utf-8").splitlines())
        guards[house.part(module)] += house.guards[path]
    print(f"{'part':14} {'lines':>6} {'guards':>7} {'%':>6}")
    for part, size in sizes.most_common():
        print(f"{part or '(top)':14} {size:6} {guards[part]:7} {100 * guards[part] / size:6.1f}")
    print(f"{'all':14} {house.lines:6} {sum(guards.values()):7} {house.guard_share:6.1f}   in {len(house.paths)} files")
    for path, count in sorted(house.guards.items(), key=lambda item: -item[1])[: args.files]:
        print(f"  {count:4} guard lines  {path}")
    wrong, circles, benchmarks = house.wrong_directions(), house.circles(), house.benchmarks()
    print(f"imports in a wrong direction: {len(wrong)}", *wrong, sep="\n  ")
    print(f"circles: {len(circles)}", *(f"{len(group)} modules: {', '.join(group)}" for group in circles), sep="\n  ")
    print(f"private names imported: {len(house.private)}", *house.private, sep="\n  ")
    print(f"benchmarks: {len(benchmarks)}, median {statistics.median(benchmarks.values()):.0f} lines")
    for folder in ("checkpoints", "eval"):
        print(f"files on top of {folder}/: {len(list((args.root / folder).glob('*.py')))}")
    if args.trips:
        measure_trips(args.root)


if __name__ == "__main__":
    main()
