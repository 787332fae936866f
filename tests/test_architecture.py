"""The rules of the code base, read from the sources: layers, sizes, who may call what. Each check is shown to fail."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "cryorbit"
FILES = sorted(SRC.rglob("*.py"))

LAYERS = [
    {"types", "conventions", "errors"},
    {"orbit"},
    {"groups"},
    {"physics", "io"},
    {"networks", "metrics"},
    {"volumes", "poses"},
    {"training", "simulate"},
    {"methods"},
    {"pipeline"},
    {"report"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
METHODS_SHARED = {
    "half_maps",
    "defocus",
    "map_models",
    "registry",
    "checks",
    "online_em",
    "marginal_config",
    "amortized_config",
    "decoding",
    "pose_objectives",
    "starts",
    "refinement_config",
    "symmetric",
    "halves",
    "moment_fit",
    "moment_maps",
    "particle_moments",
}  # what the method files of one folder may look at or be looked at by
MAX_LINES = 400
MAX_ORBIT_LINES = 79

Check = Callable[[str, str], list[str]]
"""(path inside the package, source text) -> violations."""


def _imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level  # relative: refused below


def _part(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def import_layers(path: str, text: str) -> list[str]:
    """Imports go to lower layers only; parts of one layer do not know each other, except at the bottom."""
    here = _part(path)
    if here == "__init__":
        return []
    if here not in RANK:
        return [f"{path}: {here} belongs to no layer"]
    found = []
    for name in _imports(ast.parse(text)):
        if name.startswith("."):
            found.append(f"{path}: relative import")
        parts = name.split(".")
        if parts[0] != "cryorbit" or len(parts) < 2 or parts[1] not in RANK:
            continue
        there = parts[1]
        if there != here and not (RANK[there] < RANK[here] or RANK[there] == RANK[here] == 0):
            found.append(f"{path}: {here} imports {name}")
    return found


def methods_apart(path: str, text: str) -> list[str]:
    """A method never imports another method."""
    here = path.split("/")
    if here[0] != "methods" or here[-1].removesuffix(".py") in METHODS_SHARED:
        return []
    names = (name.split(".") for name in _imports(ast.parse(text)))
    return [
        f"{path}: imports {'.'.join(n)}"
        for n in names
        if n[:2] == ["cryorbit", "methods"] and len(n) > 2 and n[2] not in METHODS_SHARED
    ]


def file_length(path: str, text: str) -> list[str]:
    """No file grows beyond what one reads in a sitting; no exceptions so far."""
    lines = text.count("\n")
    limit = MAX_ORBIT_LINES if path == "orbit.py" else MAX_LINES
    return [f"{path}: {lines} lines, at most {limit}"] if lines > limit else []


def transforms_in_one_place(path: str, text: str) -> list[str]:
    """``torch.fft`` belongs to physics/fourier.py alone."""
    if path == "physics/fourier.py":
        return []
    tree = ast.parse(text)
    used = any(
        isinstance(node, ast.Attribute)
        and node.attr == "fft"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        for node in ast.walk(tree)
    )
    imported = any(name.startswith("torch.fft") for name in _imports(tree))
    return [f"{path}: torch.fft"] if used or imported else []


def relion_names_in_one_place(path: str, text: str) -> list[str]:
    """Only ``io/`` and ``conventions.py`` know RELION's column names."""
    if path.startswith("io/") or path == "conventions.py":
        return []
    return [f"{path}: {name}" for name in sorted(set(re.findall(r"_?rln[A-Z]\w*", text)))]


def annotations_are_evaluated(path: str, text: str) -> list[str]:
    """Postponed annotations would switch jaxtyping's checks off."""
    names = list(_imports(ast.parse(text)))
    if "__future__.annotations" in names and any(name.startswith("jaxtyping") for name in names):
        return [f"{path}: from __future__ import annotations beside jaxtyping"]
    return []


def nothing_is_executed(path: str, text: str) -> list[str]:
    """Loading never executes: no pickle.load, eval, exec, shell, allow_pickle=True, weights_only=False."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"eval", "exec", "os.system"} or re.fullmatch(r"(c?pickle|dill|joblib)\.loads?", called):
            found.append(f"{path}:{node.lineno}: {called}")
        for keyword in node.keywords:
            if (keyword.arg, ast.unparse(keyword.value)) in {
                ("shell", "True"),
                ("allow_pickle", "True"),
                ("weights_only", "False"),
            }:
                found.append(f"{path}:{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return found


def no_asserts(path: str, text: str) -> list[str]:
    """Input is checked with ``errors.py``; only ``assert x is not None``, for the type checker, is allowed."""
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert) and not ast.unparse(node.test).endswith(" is not None")
    ]


def one_training_loop(path: str, text: str) -> list[str]:
    """``for step in ...`` and its kin live in ``training/`` (an alignment in ``metrics/`` trains nothing)."""
    if path.startswith(("training/", "metrics/")):
        return []
    loops = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.For) and isinstance(n.target, ast.Name))
    return [f"{path}:{n.lineno}: for {n.target.id}" for n in loops if n.target.id in {"epoch", "step", "iteration"}]


CHECKS: dict[Check, tuple[str, str]] = {
    import_layers: ("io/star.py", "from cryorbit.physics.ctf import ctf\n"),
    methods_apart: ("methods/moments.py", "from cryorbit.methods.marginal import Marginal\n"),
    file_length: ("cli/main.py", "x = 1\n" * (MAX_LINES + 1)),
    transforms_in_one_place: ("metrics/fsc.py", "import torch\ny = torch.fft.rfft(x)\n"),
    relion_names_in_one_place: ("cli/main.py", 'column = "rlnDefocusU"\n'),
    annotations_are_evaluated: ("types.py", "from __future__ import annotations\nfrom jaxtyping import Float\n"),
    nothing_is_executed: ("io/pkl.py", "import pickle\npickle.load(f)\n"),
    no_asserts: ("types.py", "assert x > 0\n"),
    one_training_loop: ("methods/moments.py", "for step in range(3):\n    pass\n"),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_sources_keep_the_rule(check: Check) -> None:
    violations = [
        found for file in FILES for found in check(file.relative_to(SRC).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert violations == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_check_can_fail(check: Check) -> None:
    path, bad = CHECKS[check]
    assert check(path, bad) != []
    assert check(path, "x = 1\n") == []


@pytest.mark.parametrize(
    ("check", "path", "bad"),
    [
        (import_layers, "physics/ctf.py", "from cryorbit.io import star\n"),
        (import_layers, "orbit.py", "from cryorbit.groups.so3 import SO3\n"),
        (import_layers, "groups/so3.py", "def f():\n    import cryorbit.cli.main\n"),
        (import_layers, "report/html.py", "from . import x\n"),
        (import_layers, "helpers/misc.py", "x = 1\n"),
        (file_length, "orbit.py", "\n" * 80),
        (transforms_in_one_place, "io/a.py", "from torch.fft import rfft\n"),
        (transforms_in_one_place, "io/a.py", "from torch import fft\n"),
        (nothing_is_executed, "io/a.py", "np.load(p, allow_pickle=True)\n"),
        (nothing_is_executed, "io/a.py", "subprocess.run(c, shell=True)\n"),
        (nothing_is_executed, "io/a.py", "torch.load(p, weights_only=False)\n"),
        (nothing_is_executed, "io/a.py", "eval('1')\n"),
    ],
)
def test_check_sees_other_forms(check: Check, path: str, bad: str) -> None:
    assert check(path, bad) != []


def test_sources_were_found() -> None:
    assert len(FILES) > 30
    assert sum("from cryorbit" in file.read_text(encoding="utf-8") for file in FILES) > 15


def _loads_torch(modules: list[str]) -> bool:
    """Whether a fresh interpreter has torch after importing ``modules``."""
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


def _modules(*folders: str) -> list[str]:
    files = [file for folder in folders for file in sorted((SRC / folder).rglob("*.py"))]
    names = [file.relative_to(SRC.parent).with_suffix("").as_posix().replace("/", ".") for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_readers_and_report_never_load_torch() -> None:
    assert len(_modules("io")) > 3
    assert not _loads_torch(_modules("io", "report"))


def test_command_line_starts_without_torch() -> None:
    assert not _loads_torch(["cryorbit.cli.main"])


def test_torch_detector_can_fail() -> None:
    assert _loads_torch(["cryorbit.physics.ctf"])
