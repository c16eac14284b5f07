"""The table of packages: an arrow runs downwards only, and no files of one package import each other in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
from helpers.commands import ROOT

import d2_headadapt

PACKAGE = Path(d2_headadapt.__file__).parent

# One floor a line, from the ground up: a package imports only what stands on lower floors. What shares a floor
# stands side by side and knows nothing of its neighbour.
FLOORS = """
key version deferred
errors said
files adapt
data
config
modeling
checkpoint evaluation
fit
setup
doctor
engine
export
cli
__init__ __main__
"""
FACES = {"__init__"}
"""The package's own face hands names on, and is imported by nobody inside."""


def floors(text: str = FLOORS) -> dict[str, int]:
    """Package -> its floor."""
    found = {name: floor for floor, line in enumerate(text.strip().splitlines()) for name in line.split()}
    assert len(found) == len(text.split()), "a package is in the table twice"
    return found


def package_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(module: str, source: str, known: Collection[str]) -> set[str]:
    """Modules of this package that a module imports, wherever in it; ``files`` is ``files/__init__.py``."""
    package = [] if module == "__init__" else module.split(".") if module in packages(known) else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            elif base[:1] == ["d2_headadapt"]:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in known else ".".join(base) or "__init__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "d2_headadapt":
                    found.add(rest or "__init__")
    return found


def packages(known: Collection[str]) -> set[str]:
    """Modules that have modules inside them."""
    return {name.rpartition(".")[0] for name in known if "." in name}


def wrong_arrows(sources: Mapping[str, str], table: Mapping[str, int]) -> list[str]:
    """Every import of a module on the same or a higher floor, in another package, as ``a -> b``."""
    return [
        f"{name} -> {other}"
        for name, source in sources.items()
        for other in sorted(imports_of(name, source, sources))
        if package_of(other) != package_of(name)
        and table.get(package_of(other), len(table)) >= table.get(package_of(name), -1)
    ]


def circles(arrows: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in arrows.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1 or node in arrows.get(node, ()):
                found.append(sorted(group))

    for node in arrows:
        if node not in index:
            visit(node)
    return found


def file_arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> modules it imports. A package's ``__init__`` counts as what it hands on."""
    return {name: imports_of(name, source, sources) - FACES for name, source in sources.items()}


def package_arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Package -> other packages that its files import."""
    found: dict[str, set[str]] = {}
    for name, others in file_arrows(sources).items():
        found.setdefault(package_of(name), set()).update(map(package_of, others))
    return {name: others - {name} for name, others in found.items()}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Module -> its text."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def test_every_package_is_in_the_table_and_nothing_else(sources: dict[str, str]) -> None:
    assert set(floors()) == set(map(package_of, sources))


def test_only_the_ground_and_the_face_stand_outside_packages(sources: dict[str, str]) -> None:
    flat = {name for name in sources if "." not in name and name not in packages(sources)}
    assert flat == {"key", "errors", "said", "version", "deferred", "__init__", "__main__"}


def test_arrows_run_downwards(sources: dict[str, str]) -> None:
    assert wrong_arrows(sources, floors()) == []


def test_no_circle_between_packages(sources: dict[str, str]) -> None:
    assert circles(package_arrows(sources)) == []


def test_no_circle_inside_a_package(sources: dict[str, str]) -> None:
    assert circles(file_arrows(sources)) == []


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("adapt.plan", "from ..checkpoint.checkpointer import HeadAdaptCheckpointer", "checkpoint.checkpointer"),
        ("adapt.layouts", "def f():\n    from ..engine import train", "engine.train"),
        ("adapt.classes", "import d2_headadapt.data.datasets", "data.datasets"),
        ("adapt.classes", "from d2_headadapt.files import shapes_of", "files"),
        ("config.keys", "import d2_headadapt", "__init__"),
        ("files.saving", "from ..adapt.plan import AdaptPlan", "adapt.plan"),
        ("files", "from .. import engine", "engine"),
        ("evaluation.build", "from ..checkpoint.ranks import agree", "checkpoint.ranks"),
        ("errors", "from .adapt.plan import AdaptPlan", "adapt.plan"),
        ("doctor.finding", "from ..cli.commands import plan", "cli.commands"),
    ],
)
def test_mutation_an_upward_arrow_is_seen(module: str, line: str, found: str, sources: dict[str, str]) -> None:
    spoilt = wrong_arrows({**sources, module: f"{sources[module]}\n{line}\n"}, floors())
    assert set(spoilt) - set(wrong_arrows(sources, floors())) == {f"{module} -> {found}"}


@pytest.mark.parametrize(
    ("module", "line", "group"),
    [
        ("adapt.classes", "from .report import plan_table", {"adapt.classes", "adapt.report"}),
        ("files.saving", "def f():\n    from . import shapes_of", {"files", "files.saving"}),
    ],
)
def test_mutation_a_circle_inside_a_package_is_seen(
    module: str, line: str, group: set[str], sources: dict[str, str]
) -> None:
    (found,) = circles(file_arrows({**sources, module: f"{sources[module]}\n{line}\n"}))
    assert group <= set(found)


def test_mutation_a_circle_between_packages_is_seen(sources: dict[str, str]) -> None:
    line = "from ..doctor.finding import Finding"
    spoilt = {**sources, "setup.components": f"{sources['setup.components']}\n{line}\n"}
    assert any({"doctor", "setup"} <= set(group) for group in circles(package_arrows(spoilt)))


def test_nothing_but_config_declares_keys(sources: dict[str, str]) -> None:
    """Only ``config/keys.py`` names a key with a value; an assignment elsewhere changes one that is there."""
    for name, source in sources.items():
        declared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        makes = [call for call in declared if getattr(call.func, "id", "") == "CfgNode" and not call.args]
        assert not makes or name == "config.keys", name


def test_without_detectron2_one_line_says_how_to_get_it() -> None:
    """The last line is all that a user reads; a folder named detectron2 (a clone) is no detectron2 either."""
    code = "import sys; sys.modules['detectron2'] = None\nimport d2_headadapt\n"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("ImportError: d2_headadapt needs detectron2, which is not on PyPI")
    assert "https://detectron2.readthedocs.io/tutorials/install.html" in ran.stderr.splitlines()[-1]


def test_a_folder_called_detectron2_is_no_detectron2(tmp_path: Path) -> None:
    """A clone in the working directory is importable as an empty namespace."""
    (tmp_path / "detectron2").mkdir()
    code = (
        f"import sys\nsys.path[:] = [{str(tmp_path)!r}, {str(ROOT)!r}] + "
        "[p for p in sys.path if 'site-packages' not in p]\nimport d2_headadapt\n"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("ImportError: d2_headadapt needs detectron2")
