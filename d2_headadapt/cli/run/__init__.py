"""Run existing detectron2 scripts, unmodified, with this package in place: ``d2-headadapt run``.

A script has imported names before anything of ours runs, and spawned processes import it again, so replacing
attributes of modules would not reach it. Classes, the default config and the registries are the same objects
everywhere, and are changed in place (:mod:`.configs`, :mod:`.models`, :mod:`.training`); the function of a spawned
process is wrapped in an object whose unpickling does the same there (:mod:`.adoption`).
"""

from __future__ import annotations

from .adoption import Adoption as Adoption
from .scripts import run_script as run_script
