"""LazyConfigs: python files of ``LazyCall`` nodes, with a node ``head_adapt`` for the keys of this package."""

from __future__ import annotations

from .loading import is_lazy as is_lazy
from .loading import load_lazy_config as load_lazy_config
from .preparing import Prepared as Prepared
from .preparing import prepare as prepare
