"""The public names: what they are, that each says what it is, and that docs, configs and tools use no others."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import pkgutil
import pydoc
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from helpers.commands import ROOT
from helpers.docstrings import is_imperative

import d2_headadapt
from d2_headadapt import errors
from d2_headadapt.errors import UsageError

PACKAGES = ("d2_headadapt", *(f"d2_headadapt.{name}" for name in ("data", "engine", "errors", "export", "fit")))


def modules() -> list[ModuleType]:
    return [importlib.import_module(name) for name in PACKAGES]


def public() -> Iterator[tuple[str, str, Any]]:
    """(package, name, value) of every public name."""
    for module in modules():
        for name in module.__all__:
            yield module.__name__, name, getattr(module, name)


# ------------------------------------------------------------------------------------------------ names come lazily


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "d2_headadapt.errors"])
def test_what_mypy_sees_is_what_python_gives(name: str) -> None:
    """Under TYPE_CHECKING stands what ``_HOMES`` holds: each name from the module that has it."""
    module = importlib.import_module(name)
    [block] = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)][-1:]
    assert isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
    seen = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            home = "." * (statement.level - 1) + (statement.module or "")
            seen[alias.asname] = home if alias.name == alias.asname else f"{home}:{alias.name}"
    assert seen == vars(module)["_HOMES"]


def test_a_name_is_in_order_and_no_module_hides_it() -> None:
    """ruff's order for ``__all__``; a submodule of the same name would take its place once it is imported."""

    def rank(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)

    for module in modules():
        names = list(vars(module).get("_HOMES", ()))
        assert names == sorted(names, key=rank), module.__name__
        inside = {info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))}
        assert not inside & set(names), module.__name__


def test_star_dir_help_and_pickle_know_every_name() -> None:
    for module in modules():
        given: dict[str, Any] = {}
        exec(f"from {module.__name__} import *", given)
        assert set(module.__all__) <= given.keys() & set(dir(module))
        told = pydoc.render_doc(module, renderer=pydoc.plaintext)
        assert [name for name in module.__all__ if name not in told] in (
            [],
            ["__version__"],
        )  # which help calls VERSION
    for _, name, value in public():
        if isinstance(value, (type, FunctionType)):
            assert pickle.loads(pickle.dumps(value)) is value, name


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'd2_headadapt' has no attribute 'HeadAdaptCheckpointr'"):
        _ = d2_headadapt.HeadAdaptCheckpointr
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from d2_headadapt.engine import nothing")


def test_a_public_package_is_an_attribute_at_once() -> None:
    code = "import d2_headadapt\nprint(d2_headadapt.errors.UsageError.exit_code, d2_headadapt.fit.FitSettings.__name__)"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "2 FitSettings\n"), ran.stderr


def test_every_exception_is_public() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(errors.__all__) == found


# ------------------------------------------------------------------------------------------ each says what it is


def first_line(text: str | None) -> str:
    return (inspect.cleandoc(text or "").splitlines() or [""])[0]


def constant_docs(module: str) -> dict[str, str]:
    """Name -> the string behind its assignment, in a module of this package."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    found = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        text = after.value if isinstance(after, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            found.update({target.id: text.value for target in targets if isinstance(target, ast.Name)})
    return found


def raised(function: Callable[..., Any]) -> set[str]:
    """This package's exceptions that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc.func for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.id for call in calls if isinstance(call, ast.Name) and call.id in errors.__all__}


def function_faults(name: str, function: Callable[..., Any], *, takes: bool = True) -> Iterator[str]:
    """What is missing in a function's docstring.

    Args:
        takes: it has to name its arguments; not where detectron2 or Python calls it.
    """
    function = inspect.unwrap(function)
    doc = inspect.cleandoc(function.__doc__ or "")
    if not doc:
        yield f"{name}: no docstring"
        return
    if not is_imperative(first_line(doc)):
        yield f"{name}: no imperative: {first_line(doc)}"
    names = [p for p in inspect.signature(function).parameters if p not in ("self", "cls", "args", "kwargs")]
    silent = [p for p in names if not re.search(rf"\b{p}\b", doc)]
    if takes and silent:
        yield f"{name}: says nothing of {', '.join(silent)}"
    missing = [e for e in raised(function) if e not in doc.partition("Raises:")[2]]
    if missing:
        yield f"{name}: does not say that it raises {', '.join(missing)}"


def is_stock(value: Any) -> bool:
    """Whether it is detectron2's own, which a class of ours takes over."""
    return str(value.__module__).startswith("detectron2.")


def class_faults(name: str, cls: type) -> Iterator[str]:
    own = vars(cls).get("__doc__") or ""
    if not own or own.startswith(f"{cls.__name__}("):
        yield f"{name}: no docstring"
    init = vars(cls).get("__init__")
    doc = own + (init.__doc__ or "" if isinstance(init, FunctionType) else "")
    given = [field.name for field in fields(cls)] if is_dataclass(cls) else []
    if init is not None and not given:
        given = [p for p in list(inspect.signature(init).parameters)[1:] if p not in ("args", "kwargs")]
    silent = [p for p in (*given, *own_attributes(cls)) if p[0] != "_" and not re.search(rf"\b{p}\b", doc)]
    if silent:
        yield f"{name}: says nothing of {', '.join(dict.fromkeys(silent))}"
    for member, value in vars(cls).items():
        function = getattr(value, "__func__", value)
        if member.startswith("_"):
            continue
        if isinstance(value, (property, cached_property)):
            if not first_line(value.__doc__) and not is_stock(getattr(value, "fget", value)):
                yield f"{name}.{member}: no docstring"
        elif isinstance(function, FunctionType) and not is_stock(function):
            overrides = any(hasattr(base, member) for base in cls.__mro__[1:])
            yield from function_faults(f"{name}.{member}", function, takes=not overrides)


def own_attributes(cls: type) -> Iterator[str]:
    """The attributes that the constructor of a class sets itself."""
    init = vars(cls).get("__init__")
    if is_dataclass(cls) or not isinstance(init, FunctionType):
        return
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(init))))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def faults() -> list[str]:
    found = []
    for package, name, value in public():
        full = f"{package}.{name}"
        if isinstance(value, type):
            found += class_faults(full, value)
        elif isinstance(value, FunctionType):
            found += function_faults(full, value)
        elif name != "__version__" and first_line(value.__doc__) == first_line(type(value).__doc__):
            module = importlib.import_module(package)
            home, _, other = vars(module).get("_HOMES", {}).get(name, "").partition(":")
            where = importlib.util.resolve_name(f".{home}", package) if home else package
            if not first_line(constant_docs(where).get(other or name)):
                found.append(f"{full}: no docstring")
    return found


def test_every_public_name_says_what_it_is() -> None:
    assert faults() == []


def returns_rows(rows: int) -> int:
    """Returns the rows."""
    raise errors.ConfigError("x", expected="y", found="z", fix="w")


class Silent:
    """A class that hides what it keeps."""

    def __init__(self) -> None:
        self.kept = 0

    def method(self) -> None:
        pass


def test_mutation_a_silent_function_or_class_is_named() -> None:
    assert list(function_faults("f", returns_rows)) == ["f: no imperative: Returns the rows."]
    assert list(function_faults("f", lambda: None)) == ["f: no docstring"]
    assert list(class_faults("C", Silent)) == ["C: says nothing of kept", "C.method: no docstring"]


def test_mutation_arguments_and_exceptions_are_asked_for() -> None:
    def cut(rows: int, by: int) -> int:
        """Cut the rows."""
        raise UsageError("x", expected="y", found="z", fix="w")

    assert list(function_faults("f", cut)) == ["f: says nothing of by", "f: does not say that it raises UsageError"]


# ------------------------------------------------------------------------------------- docs, configs and tools use it

_BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_MENTION = re.compile(r"`d2_headadapt\.([\w.]+)")


def imported(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a source imports of this package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "d2_headadapt":
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "d2_headadapt")


def sources() -> Iterator[tuple[str, str]]:
    """(where, python source) of the tools, the configs, and each block in the docs."""
    for path in sorted([*ROOT.glob("tools/**/*.py"), *ROOT.glob("configs/**/*.py")]):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in pages():
        for _, block in _BLOCK.findall(path.read_text(encoding="utf-8")):
            yield str(path.relative_to(ROOT)), textwrap.dedent(block)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def foreign(source: str) -> list[str]:
    """What a source imports that is no public name of a public package."""
    return [
        f"{module}.{name}".rstrip(".")
        for module, name in imported(source)
        if module not in PACKAGES
        or (name and name not in importlib.import_module(module).__all__ and f"{module}.{name}" not in PACKAGES)
    ]


def test_docs_configs_and_tools_import_public_names_only() -> None:
    found = list(sources())
    assert sum(bool(list(imported(source))) for _, source in found) >= 20
    assert [(where, wrong) for where, source in found if (wrong := foreign(source))] == []


def test_names_in_the_text_of_docs_are_public() -> None:
    public_names = {*PACKAGES, *(f"{package}.{name}" for package, name, _ in public())}
    for path in pages():
        for mentioned in _MENTION.findall(path.read_text(encoding="utf-8")):
            assert f"d2_headadapt.{mentioned}" in public_names, f"{path.name}: {mentioned}"


@pytest.mark.parametrize(
    "line",
    [
        "from d2_headadapt.engine.train import setup",
        "from d2_headadapt import build_conv_net_backbone",
        "import d2_headadapt.adapt.plan",
        "def f():\n    from d2_headadapt.files import read_checkpoint",
    ],
)
def test_mutation_an_inner_import_is_named(line: str) -> None:
    assert len(foreign(line)) == 1
    assert foreign("from d2_headadapt import Trainer, fit\nfrom d2_headadapt.engine import setup") == []
