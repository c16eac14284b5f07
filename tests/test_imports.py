"""The table of rooms: a module imports only modules above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
from helpers.commands import ROOT

import d2_headadapt

PACKAGE = Path(d2_headadapt.__file__).parent

# In this order: a module may import those before it, and `errors` is open to all.
ROOMS = """
version errors
config classes matching layouts
vocabularies categories entries tasks tasks.labels datasets tasks.spec tasks.data settings
layout_registry detectron2_layouts tasks.heads tasks.mapper tasks.boxes tasks.checks
surgery plan groups planning
report class_picture report_html
files.arrays files.pickle_machine files.unpickling files.torchzip files.torch_tensors files.torchfile
files.safetensor_files files.saving files
names selecting provenance
moments ranks resuming
predictor roi_heads text text.bundle text.problems text.preflight text.predictor text.nearest
tasks.backbones tasks.dry_run tasks.pooling tasks.classifier
tasks.metrics tasks.metric_files tasks.evaluation tasks.drawing tasks.watching
loading untrained checkpoint
fit.options fit.reservoir fit.solvers fit.images fit.sharing fit.rows fit.anchors fit.rpn fit.dense fit.scores
fit.text fit.boxes fit.masks
fit.tasks fit.calm fit.entry fit.report fit.training fit
mapped own_loop components building configuring
lazy.words lazy.loading lazy.tree lazy.counts lazy.mirror lazy.preparing lazy recipes
doctor.context doctor.finding doctor.coco_json doctor.reading doctor.config_checks doctor.training_checks
doctor.component_checks
doctor.data_checks doctor.box_checks doctor.field_checks doctor.image_checks
doctor.weights_checks doctor.resume_checks doctor.text_checks doctor.walking doctor.model_checks
doctor.running doctor
doctor.known_errors doctor.known_shapes doctor.known_messages doctor.explain
launching evaluators engine lazy.training
adopting.configs adopting.models adopting.training adopting.said adopting.adoption adopting.scripts adopting
predicting
exporting.tables exporting.flat exporting.scripting exporting.formats exporting.parity exporting.entry exporting
commands cli
__init__ __main__
"""


def rooms(text: str = ROOMS) -> dict[str, int]:
    """Module -> its place in the table."""
    names = text.split()
    assert len(names) == len(set(names)), "a module is in the table twice"
    return {name: i for i, name in enumerate(names)}


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


def wrong_imports(sources: dict[str, str], table: dict[str, int]) -> list[str]:
    """Every import of a module that stands later in the table, or of none in it, as ``a -> b``."""
    return [
        f"{name} -> {other}"
        for name, source in sources.items()
        for other in sorted(imports_of(name, source, sources))
        if other != "errors" and table.get(other, len(table)) >= table.get(name, -1)
    ]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """Module -> its text."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def test_every_module_is_in_the_table_and_nothing_else(sources: dict[str, str]) -> None:
    assert set(rooms()) == set(sources)


def test_a_module_imports_only_what_is_above_it(sources: dict[str, str]) -> None:
    assert wrong_imports(sources, rooms()) == []


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("plan", "from .checkpoint import HeadAdaptCheckpointer", "plan -> checkpoint"),
        ("layouts", "def f():\n    from . import engine", "layouts -> engine"),
        ("classes", "import d2_headadapt.datasets", "classes -> datasets"),
        ("classes", "from d2_headadapt.vocabularies import vocabulary", "classes -> vocabularies"),
        ("config", "import d2_headadapt", "config -> __init__"),
        ("surgery", "from .surgery import move_rows", "surgery -> surgery"),
        (
            "files.arrays",
            "from ..plan import AdaptPlan\nfrom .saving import write_text",
            "files.arrays -> files.saving",
        ),
        ("files.arrays", "from .. import engine", "files.arrays -> engine"),
        ("files", "from ..checkpoint import HeadAdaptCheckpointer", "files -> checkpoint"),
    ],
)
def test_mutation_an_upward_import_is_seen(module: str, line: str, found: str, sources: dict[str, str]) -> None:
    spoilt = wrong_imports({**sources, module: f"{sources[module]}\n{line}\n"}, rooms())
    assert set(spoilt) - set(wrong_imports(sources, rooms())) == {found}


def test_nothing_but_config_declares_keys(sources: dict[str, str]) -> None:
    """Only ``config.py`` names a key with a value; an assignment elsewhere changes one that is there."""
    for name, source in sources.items():
        declared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        makes = [call for call in declared if getattr(call.func, "id", "") == "CfgNode" and not call.args]
        assert not makes or name == "config", name


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
