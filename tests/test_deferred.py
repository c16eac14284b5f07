"""What an import loads, and that the components are registered whatever is imported first."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT, python
from test_imports import PACKAGE, imports_of

from d2_headadapt.deferred import AWAITED, REGISTERING

MOST = 45
"""Modules of this package that its import may load."""
OURS = "[name for name in sys.modules if name.split('.')[0] == 'd2_headadapt']"
HEAVY = (
    "sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'torchvision', 'detectron2', 'numpy', 'fvcore'})"
)

REGISTERED = """
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
names = ["HeadAdaptROIHeads", "HeadAdaptCascadeROIHeads", "HeadAdaptRes5ROIHeads"]
assert all(ROI_HEADS_REGISTRY.get(name).__module__.startswith("d2_headadapt") for name in names)
assert META_ARCH_REGISTRY.get("MultiTaskClassifier") and BACKBONE_REGISTRY.get("build_conv_net_backbone")
from d2_headadapt import PREDICTOR_REGISTRY
assert {"HeadAdaptOutputLayers", "HeadAdaptTextOutputLayers"} <= {name for name, _ in PREDICTOR_REGISTRY}
"""
ORDERS = {
    "this package first": "import d2_headadapt\nimport detectron2.modeling",
    "detectron2.modeling first": f"import detectron2.modeling, d2_headadapt\nassert len({OURS}) < {MOST}, {OURS}",
    "in the middle of detectron2.engine": "import d2_headadapt\nimport detectron2.engine",
    "in the middle of detectron2.model_zoo": "import d2_headadapt\nfrom detectron2 import model_zoo",
    "in the middle of detectron2.export": "import d2_headadapt\nimport detectron2.export.flatten",
    "a submodule of detectron2.modeling": "import d2_headadapt\nfrom detectron2.modeling.roi_heads import ROIHeads",
    "a module of ours that registers": "import d2_headadapt.modeling.roi_heads",
    "a module of ours that others import": "from d2_headadapt.modeling.task_heads import TaskHeads",
    "a name of ours that needs detectron2.engine": "from d2_headadapt import Trainer",
    "our package again": "import d2_headadapt, importlib\nimportlib.reload(d2_headadapt)\nimport detectron2.modeling",
    "after it was looked for": "import d2_headadapt, importlib.util\nimportlib.util.find_spec('detectron2.modeling')",
    "after its import failed once": """
import d2_headadapt, builtins
sys.modules["detectron2.modeling.matcher"] = None
try:
    import detectron2.modeling
except ImportError:
    del sys.modules["detectron2.modeling.matcher"]
    for name in [name for name in sys.modules if name.startswith("detectron2.modeling")]:
        del sys.modules[name]
else:
    raise SystemExit("the import was meant to fail")
import detectron2.modeling
""",
}

# What takes long is imported once; each order runs in a fork of its own.
EACH_IN_A_FORK = """
import json, os, sys, traceback
import torch, torchvision, fvcore.nn, pycocotools.coco, matplotlib.pyplot, omegaconf, yacs.config
orders, check = json.load(sys.stdin)
for name, code in orders.items():
    assert not any(module.split(".")[0] in ("detectron2", "d2_headadapt") for module in sys.modules)
    child = os.fork()
    if child == 0:
        try:
            exec(code + "\\n" + check, {"__name__": "__main__", "sys": sys})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def test_components_are_registered_in_every_order_of_imports() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EACH_IN_A_FORK],
        cwd=ROOT,
        input=json.dumps([ORDERS, REGISTERED]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0 and ran.stdout == "", ran.stdout + ran.stderr


def test_mutation_an_order_without_this_package_is_seen() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EACH_IN_A_FORK],
        cwd=ROOT,
        input=json.dumps([{"alone": "import detectron2.modeling"}, REGISTERED]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "alone\n" and "No object named 'HeadAdaptROIHeads' found" in ran.stderr


def test_the_import_loads_few_modules_and_nothing_heavy() -> None:
    ran = python("-c", f"import sys, d2_headadapt\nprint(len({OURS}), {HEAVY})")
    count, _, heavy = ran.out.strip().partition(" ")
    assert int(count) < MOST and heavy == "[]", ran.out + ran.err


def test_detectron2_modeling_looks_as_it_does_without_this_package() -> None:
    """For inspect and importlib.resources; and nothing stays among the finders."""
    code = (
        "import sys\nbefore = list(sys.meta_path)\nimport d2_headadapt, inspect, detectron2.modeling as m\n"
        "print(type(m.__loader__).__name__, m.__spec__.loader is m.__loader__, 'import' in inspect.getsource(m),"
        " [f for f in sys.meta_path if 'd2_headadapt' in type(f).__module__])"
    )
    ran = python("-c", code)
    assert ran.out == "SourceFileLoader True True []\n", ran.err


def sources() -> dict[str, str]:
    """Module -> its text, for every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def test_whatever_registers_is_in_the_list() -> None:
    found = sources()
    registering = {name for name, source in found.items() if "_REGISTRY.register()" in source and "modeling" in name}
    reached: set[str] = set()
    waiting = list(REGISTERING)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += imports_of(name, found[name], found)
    assert registering <= reached
    assert found.keys() >= set(REGISTERING)


def early(source: str) -> set[str]:
    """Packages of detectron2 that a module imports while it is itself imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {".".join(name.split(".")[:2]) for name in found if name.startswith("detectron2.")}


def test_what_registers_waits_for_nothing_that_is_on_its_way() -> None:
    """See the docstring of d2_headadapt.deferred."""
    found = sources()
    reached: set[str] = set()
    waiting = [*REGISTERING, "modeling"]
    while waiting:
        name = waiting.pop()
        if name in reached or name == "__init__":
            continue
        reached.add(name)
        assert not early(found[name]) & {f"detectron2.{p}" for p in ("engine", "evaluation", "export", "model_zoo")}, (
            name
        )
        assert AWAITED not in early(found[name]) or name.split(".")[0] == "modeling", name
        waiting += imports_of(name, found[name], found)
    assert len(reached) > 20


def test_the_package_of_what_registers_imports_detectron2_modeling_first() -> None:
    first = next(
        node for node in ast.parse(sources()["modeling"]).body if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    assert isinstance(first, ast.Import) and first.names[0].name == AWAITED


@pytest.mark.parametrize("line", ["import detectron2.engine", "from detectron2.evaluation import COCOEvaluator"])
def test_mutation_an_import_that_is_on_its_way_is_seen(line: str) -> None:
    assert early(f"import torch\n{line}\n") & {"detectron2.engine", "detectron2.evaluation"}
    assert early("def f():\n    import detectron2.engine\n") == set()


def test_a_worker_that_is_spawned_has_them(tmp_path: Path) -> None:
    """It unpickles a function of the script, whose first line imports this package."""
    script = tmp_path / "spawns.py"
    script.write_text(
        "import multiprocessing\nimport d2_headadapt\n\n\n"
        "def worker():\n    from detectron2.modeling import ROI_HEADS_REGISTRY\n\n"
        "    print(ROI_HEADS_REGISTRY.get('HeadAdaptROIHeads').__name__, flush=True)\n\n\n"
        "if __name__ == '__main__':\n    process = multiprocessing.get_context('spawn').Process(target=worker)\n"
        "    process.start()\n    process.join()\n"
    )
    ran = python(script)
    assert ran.out == "HeadAdaptROIHeads\n", ran.err
