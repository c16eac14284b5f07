"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], packages: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package.

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
