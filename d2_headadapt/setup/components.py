"""Import a user's own modules, once in every process, so that what they register is there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..errors import UsageError


def import_components(specs: Sequence[str]) -> list[ModuleType]:
    """Import each ``--import`` argument: a module name, or the path of a ``.py`` file.

    A file is entered in ``sys.modules`` under its stem and never executed twice, because whatever it registers would
    then be registered twice.

    Raises:
        UsageError: not a module, not a file, or another module has the file's name.
    """
    return [_import_file(spec) if spec.endswith(".py") else _import_module(spec) for spec in specs]


def add_component_keys(cfg: CfgNode, modules: Sequence[ModuleType]) -> None:
    """Call every public ``add_*_config(cfg)`` function of the imported modules, before any yaml is read."""
    for module in modules:
        for name in sorted(vars(module)):
            if name.startswith("add_") and name.endswith("_config") and callable(getattr(module, name)):
                getattr(module, name)(cfg)


def builder_of(modules: Sequence[ModuleType]) -> Callable[[CfgNode], nn.Module]:
    """Choose the ``build_model(cfg)`` that imported modules bring themselves, else detectron2's.

    Raises:
        UsageError: two modules bring different ones.
    """
    own = {module.__name__: module.build_model for module in modules if callable(getattr(module, "build_model", None))}
    found = {name: build for name, build in own.items() if build is not build_model}
    if len(set(found.values())) > 1:
        raise UsageError(
            "--import",
            expected="one build_model",
            found=f"several: of {', '.join(found)}",
            fix="Import only the module whose build_model makes the model.",
        )
    build: Callable[[CfgNode], nn.Module] = next(iter(found.values()), build_model)
    return build


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and not (name == exc.name or name.startswith(exc.name + ".")):
            raise
        raise UsageError(
            f"--import {name}",
            expected="a module that can be imported",
            found=f"no module {exc.name!r}",
            fix="Install it, add its folder to PYTHONPATH, or give the path of the file.",
        ) from exc


def _import_file(path: str) -> ModuleType:
    real = os.path.realpath(path)
    if not os.path.isfile(real):
        raise UsageError(f"--import {path}", expected="a .py file", found="no such file", fix="Correct the path.")
    stem = os.path.splitext(os.path.basename(real))[0]
    loaded = sys.modules.get(stem)
    if loaded is not None:
        if os.path.realpath(getattr(loaded, "__file__", None) or "") == real:
            return loaded
        raise UsageError(
            f"--import {path}",
            expected="a file whose name no imported module has",
            found=f"module {stem!r} of {getattr(loaded, '__file__', 'the interpreter')}",
            fix="Rename the file.",
        )
    spec = importlib.util.spec_from_file_location(stem, real)
    if spec is None or spec.loader is None:
        raise UsageError(f"--import {path}", expected="a Python file", found="something else", fix="Correct the path.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # A half-executed module must not look imported to the next attempt.
        del sys.modules[stem]
        raise
    return module
