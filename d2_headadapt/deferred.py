"""Delay imports until somebody needs them: names of a package, and the components that a config names.

A config names them (``MODEL.ROI_HEADS.NAME: HeadAdaptROIHeads``), so they must be registered after a plain
``import d2_headadapt``. Registering needs ``detectron2.modeling``, and that needs torch. Who builds a model imports
``detectron2.modeling``; who prints a version does not. So components are registered as soon as it is imported: at once
where it is already, else at the end of its import, by a finder on ``sys.meta_path`` that knows this one name and leaves
once it is done. A component that cannot be imported lets that import fail with its own traceback.

What registers must therefore import neither a package of detectron2 that is still on its way when it imports
``detectron2.modeling`` (``engine``, ``evaluation``, ``export``, ``model_zoo``), nor ``detectron2.modeling`` itself from
outside :mod:`d2_headadapt.modeling`, which imports it before anything else. ``tests/test_deferred.py`` holds that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AWAITED = "detectron2.modeling"
REGISTERING = ("modeling.backbone", "modeling.classifier", "modeling.roi_heads", "modeling.text.predictor")
"""The modules of this package that enter something in a registry."""


def register_components() -> None:
    """Import what registers, now or when ``detectron2.modeling`` is imported."""
    if AWAITED in sys.modules:
        _import_registering()
    else:
        sys.meta_path.insert(0, _Finder())


def _import_registering() -> None:
    for name in REGISTERING:
        importlib.import_module(f"{__package__}.{name}")


class _Finder(MetaPathFinder):
    """A finder that finds nothing itself: it asks those after it, and adds a last step to what they found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """A loader that loads as ``found`` does, and then registers."""

    def __init__(self, found: Loader, finder: _Finder) -> None:
        self.found = found
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        """Answer whatever else is asked of a loader, such as the source."""
        return getattr(self.found, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.found.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Who looks at the module afterwards (inspect, importlib.resources) sees the loader that it really has.
        module.__loader__ = self.found
        if module.__spec__ is not None:
            module.__spec__.loader = self.found
        self.found.exec_module(module)
        _import_registering()
        # Not before: an import that failed may be tried again.
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)


def lazy_names(
    package: str, homes: Mapping[str, str], packages: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package whose names are imported when first asked for (PEP 562).

    Args:
        package: its ``__name__``.
        homes: name -> the module inside the package that has it (one dot in front: beside the package);
            ``module:other`` where it has another name there.
        packages: packages inside it that are imported as attributes too.
    """

    def get(name: str) -> Any:
        if name in homes:
            module, _, other = homes[name].partition(":")
            value = getattr(importlib.import_module(f".{module}", package), other or name)
        elif name in packages:
            value = importlib.import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # Whoever asks again gets it without coming here.
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *packages})

    return get, names
