"""What the packages may import, and what no line of them may call."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ul_runtime", "ul_train", "ul_export")  # from below: each may import those before it
TAKES_ONNX = ROOT / "ul_runtime" / "backends" / "onnx_weights.py"  # when it is called, for OpenVINO and TensorRT alone
NEVER_IN_RUNTIME = {"torch", "onnx", "onnxscript", "safetensors.torch", "sklearn", "datasets"}
NEVER = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
TRUE_IS_REFUSED = {"allow_pickle", "trust_remote_code"}
PINNED = ROOT / "ul_export" / "evaluation" / "features.py"  # unpickles bytes of a known SHA-256


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported, anywhere: by statement, or by name through importlib or a subprocess."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split()
            yield from (word for word in words if len(words) == 1 and re.fullmatch(r"ul_\w+\.[\w.]+", word))


def at_run_time(tree: ast.AST) -> ast.AST:
    """Without what only type checkers read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


def arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which module imports which, of these, at whatever depth of the code."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        targets = set()
        for name in imports(at_run_time(ast.parse(source))):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            targets.add(name)
        found[module] = targets - {"", module}
    return found


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Modules that import each other, in a circle of any length, folders included: arrows between packages."""
    found = arrows(sources)
    try:
        tuple(TopologicalSorter(found).static_order())
    except CycleError as error:
        return [error.args[1]]
    return []


def upward(package: str, source: str) -> list[str]:
    """Imports of a package above this one, even of what only type checkers read."""
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    return [name for name in imports(ast.parse(source)) if any(is_within(name, other) for other in above)]


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def heavy(source: str) -> list[str]:
    """Imports that the runtime must do without."""
    return [name for name in imports(ast.parse(source)) for module in NEVER_IN_RUNTIME if is_within(name, module)]


def is_restricted_load(node: ast.AST) -> bool:
    """torch.load(..., weights_only=True)."""
    restricted = "weights_only=True"
    is_load = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    return is_load and any(ast.unparse(keyword) == restricted for keyword in node.keywords)  # type: ignore[attr-defined]


def unsafe(source: str, pinned: bool = False) -> list[str]:
    """Whatever could run code from a file, leave a folder, or swallow an error; `pinned` may load weights only."""
    tree = ast.parse(source)
    found = [name for name in imports(tree) for module in NEVER if is_within(name, module)]
    allowed = [node.func for node in ast.walk(tree) if pinned and is_restricted_load(node)]  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "onnx.hub"):
            found += [] if node in allowed else [ast.unparse(node)]
        elif isinstance(node, ast.Attribute) and node.attr in ("extractall", "LOAD_TRUNCATED_IMAGES"):
            found.append(node.attr)
        elif isinstance(node, ast.keyword) and node.arg in TRUE_IS_REFUSED and ast.unparse(node.value) != "False":
            found.append(ast.unparse(node))
        elif isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            found += [caught] if caught in ("everything", "Exception", "BaseException") else []
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_names_one_above_it(package: str) -> None:
    assert len(files(package)) >= 3
    assert {str(path): found for path in files(package) if (found := upward(package, path.read_text()))} == {}


def test_the_runtime_names_nothing_heavy() -> None:
    found = {path: {name.partition(".")[0] for name in heavy(path.read_text())} for path in files("ul_runtime")}
    assert {path: names for path, names in found.items() if names} == {TAKES_ONNX: {"onnx"}}


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = {module_name(path): path.read_text() for package in PACKAGES for path in files(package)}
    assert sum(map(len, arrows(sources).values())) > len(sources)
    assert circles(sources) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"ul_a.x": "import ul_a.y", "ul_a.y": "from ul_a.x import f"},
        {"ul_a.x": "import ul_a.y", "ul_a.y": "def f():\n    from ul_a import z", "ul_a.z": "from ul_a.x import g"},
        {"ul_a": "from ul_a.x import f", "ul_a.x": "from ul_a import VERSION"},
        {"ul_a.x": "import_module('ul_a.y')", "ul_a.y": "import ul_a.x"},
    ],
)
def test_the_check_for_circles_finds_one(sources: dict[str, str]) -> None:
    assert circles(sources) != []
    assert circles(dict(list(sources.items())[:1])) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_unpickles_extracts_or_swallows(package: str) -> None:
    found = {str(path): unsafe(path.read_text(), pinned=path == PINNED) for path in files(package)}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("ul_runtime", "from ul_train.config import Config"),
        ("ul_runtime", "if TYPE_CHECKING:\n    from ul_export.export import export_bundle"),
        ("ul_runtime", "import_module('ul_train.torch_backend')"),
        ("ul_train", "import ul_export.export"),
        ("ul_train", "words = [sys.executable, '-m', 'ul_export.cli']"),
    ],
)
def test_the_check_of_directions_finds_a_wrong_import(package: str, source: str) -> None:
    assert upward(package, source) != []


@pytest.mark.parametrize("source", ["import torch", "def f():\n    from onnx import helper"])
def test_the_check_for_heavy_imports_finds_one(source: str) -> None:
    assert heavy(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "weights = torch.load(path)",
        "load = torch.load",
        "np.load(path, allow_pickle=True)",
        "open_array(path, allow_pickle=flag)",
        "archive.extractall(path)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_safety_check_finds_what_it_looks_for(source: str) -> None:
    assert unsafe(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(data)",
        "torch.load(data, weights_only=False)",
        "torch.load(data, weights_only=flag)",
        "torch.load(torch.load(path), weights_only=True)",
        "load = torch.load",
        "import pickle",
    ],
)
def test_where_known_bytes_are_loaded_only_weights_are(source: str) -> None:
    assert unsafe(source, pinned=True) != []
    assert unsafe("torch.load(data, weights_only=True)", pinned=True) == []


def test_modules_and_functions_keep_their_size() -> None:
    long = []
    for path in [path for package in PACKAGES for path in files(package)]:
        text = path.read_text()
        long += [str(path)] if text.count("\n") > 600 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path}: {node.name}")
    assert long == []


def test_the_runtime_works_where_torch_and_onnx_cannot_be_imported() -> None:
    code = """
import importlib, pkgutil, sys
for name in ("torch", "onnx", "onnxscript", "ul_train", "ul_export"):
    sys.modules[name] = None
import ul_runtime
for module in pkgutil.walk_packages(ul_runtime.__path__, "ul_runtime."):
    importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_importing_the_commands_imports_nothing_heavy() -> None:
    code = """
import sys
import ul_train.cli, ul_export.cli, ul_export.bench.cli, ul_export.evaluation.cli, ul_runtime.cli.generate
print([name for name in ("torch", "onnx", "onnxruntime", "numpy", "PIL", "pydantic") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
