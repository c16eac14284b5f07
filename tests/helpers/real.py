"""What lies in the folder of real material."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from d2_headadapt.setup.components import import_components


def fbnet_c4(real: Path) -> ModuleType:
    """The module of the real model's backbone, with ``add_fbnet_c4_config``."""
    (module,) = import_components([str(real / "models" / "fbnet_c4.py")])
    return module
