"""The command ``d2-headadapt``."""

from .parser import main as main
