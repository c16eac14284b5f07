"""Context of the checks: config, datasets, weights, plan and model, each made when first asked for and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..adapt.classes import ClassTable
from ..adapt.plan import AdaptPlan
from ..checkpoint.load import check_exists, plan_file
from ..config.keys import add_headadapt_config
from ..config.settings import AdaptSettings
from ..data.datasets import register_datasets
from ..data.task_datasets import settle_tasks
from ..errors import DatasetError, HeadAdaptError
from ..key import MODEL, Form, form_of
from ..setup.components import add_component_keys, builder_of, import_components
from ..setup.lazy.loading import load_lazy_config, unresolved
from ..setup.lazy.mirror import mirror_of
from ..setup.recipe import LazyRecipe, Recipe, resolved_recipe
from ..setup.yaml import load_config

Part = Literal["config", "registered", "settings", "recipe", "resolved", "weights", "plan", "model"]
QUICK_BYTES = 4 << 20
"""Annotation files beyond this size are left to the command: training shall not wait for them twice."""


class PartMissing(Exception):
    """A part of the context cannot be had.

    Args:
        part: its name.
        cause: the exception that it raised, or ``None`` where there simply is none.
        reason: why, in a few words.
    """

    def __init__(self, part: str, cause: BaseException | None, reason: str) -> None:
        self.part, self.cause, self.reason = part, cause, reason
        super().__init__(f"{part}: {reason}")


class DoctorContext:
    """The context that checks examine. Attributes are lazy and kept; no check may change anything in it.

    ========== ============================= =================================================================
    part       attributes                    what it is
    ========== ============================= =================================================================
    config     ``cfg``                       the config as the user wrote it, not resolved; of a LazyConfig the yaml
                                             that it amounts to, and ``lazy`` is the LazyConfig
    registered ``dataset_names`` and below   ``cfg`` loaded, and ``DATASETS.REGISTER`` entered in the catalogs
    settings   ``settings``, ``tables``      what the keys under ``MODEL.HEAD_ADAPT`` say; target tables by space
    recipe     ``recipe``                    what the model is built from
    resolved   ``resolved``                  the frozen config that training would use: counts and device written
    weights    ``weights_path``              a path that exists, or an address
    plan       ``plan``                      what loading the weights would do
    model      ``model``                     the model on the meta device, on the CPU where it does not build there
    ========== ============================= =================================================================

    Args:
        config_file, opts, imports: as for :func:`d2_headadapt.setup.recipe.read_recipe`.
        weights: a checkpoint in place of ``MODEL.WEIGHTS``.
        all_images: look at every image rather than at a sample.
        ready: a config that was resolved already, as the trainer has it; the other arguments then do not count.
        lazy: the LazyConfig that ``ready`` is the mirror of.
        quick: only small annotation files are looked at (:meth:`small`).
    """

    def __init__(
        self,
        config_file: str = "",
        opts: Sequence[str] = (),
        imports: Sequence[str] = (),
        weights: str | None = None,
        *,
        all_images: bool = False,
        ready: CfgNode | None = None,
        lazy: DictConfig | None = None,
        quick: bool = False,
    ) -> None:
        self.config_file, self.opts, self.imports = config_file, tuple(opts), tuple(imports)
        self.weights, self.all_images, self.ready, self.quick = weights, all_images, ready, quick
        self.lazy = lazy
        self._made: dict[Any, Any] = {}

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def cfg(self) -> CfgNode:
        return self.part("config")

    @property
    def defaults(self) -> CfgNode:
        """Every key with its default: detectron2's, this package's, and those of the user's imported components."""
        return self._kept("defaults", "defaults", self._defaults)

    @property
    def settings(self) -> AdaptSettings:
        found: AdaptSettings = self.part("settings")
        return found

    @property
    def tables(self) -> Mapping[str, ClassTable]:
        """Target tables by label space."""
        return self.settings.target

    @property
    def is_lazy(self) -> bool:
        """Whether a LazyConfig is examined, also one that cannot be read."""
        return self.lazy is not None or form_of(self.config_file) is Form.LAZY

    @property
    def recipe(self) -> Recipe:
        found: Recipe = self.part("recipe")
        return found

    @property
    def resolved(self) -> CfgNode:
        return self.part("resolved")

    @property
    def weights_path(self) -> str:
        found: str = self.part("weights")
        return found

    @property
    def plan(self) -> AdaptPlan:
        found: AdaptPlan = self.part("plan")
        return found

    @property
    def model(self) -> nn.Module:
        found: nn.Module = self.part("model")
        return found

    def part(self, name: str) -> Any:
        """Get a part by name.

        Raises:
            PartMissing: it cannot be had.
        """
        makers: dict[str, Callable[[], Any]] = {
            "config": self._config,
            "registered": self._registered,
            "settings": self._settings,
            "recipe": self._recipe,
            "resolved": lambda: self.recipe.config,
            "weights": self._weights,
            "plan": lambda: plan_file(self.weights_path, self.model, self.settings),
            "model": lambda: self.recipe.build_on_meta(),
        }
        return self._kept(("part", name), name, makers[name])

    def failure(self, name: str) -> BaseException | None:
        """Return the exception of making this part; ``None`` if it is there, or missing because of another."""
        try:
            self.part(name)
        except PartMissing as missing:
            return missing.cause if missing.part == name else None
        return None

    def _config(self) -> CfgNode:
        if self.ready is not None:
            return self.ready
        if form_of(self.config_file) is not Form.LAZY:
            cfg = load_config(self.config_file, self.opts, self.imports)
            if cfg.MODEL.HEAD_ADAPT.KEEP and self.weights:
                cfg.MODEL.WEIGHTS = self.weights  # Its classes are those of the file.
            return cfg
        self.lazy = load_lazy_config(self.config_file, self.opts, self.imports)
        return mirror_of(self.lazy)

    def _defaults(self) -> CfgNode:
        cfg = get_cfg()
        add_headadapt_config(cfg)
        add_component_keys(cfg, import_components(self.imports))
        return cfg

    def _registered(self) -> CfgNode:
        register_datasets(self.cfg.DATASETS.get("REGISTER", []))
        return self.cfg

    def _settings(self) -> AdaptSettings:
        cfg = self.part("registered").clone()
        cfg.defrost()
        settle_tasks(cfg, required=True)
        return AdaptSettings.from_config(cfg, required=True)

    def _recipe(self) -> Recipe:
        if self.ready is not None:
            # Who is ready has a model of its own, with its settings.
            own = AdaptSettings()
            return Recipe(self.ready, own) if self.lazy is None else LazyRecipe(self.ready, own, self.lazy)
        builder = builder_of(import_components(self.imports))
        # A test set with other classes has its own finding, and hides no mistake of the model.
        for tests in (self.part("registered").DATASETS.TEST, ()):
            cfg = self.part("registered").clone()
            cfg.DATASETS.TEST = tests
            try:
                return resolved_recipe(cfg, self.lazy, builder=builder)
            except HeadAdaptError:
                if not tests:
                    raise
        raise AssertionError("the second attempt returns or raises")

    def _weights(self) -> str:
        path: str = self.weights or self.cfg.MODEL.WEIGHTS
        if not path:
            raise PartMissing("weights", None, f"{MODEL.WEIGHTS!s} is empty")
        check_exists(path)
        return path

    def _kept(self, key: Any, part: str, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            try:
                self._made[key] = make()
            except PartMissing as missing:
                self._made[key] = missing
            except Exception as exc:
                error = unresolved(exc, self.config_file) if isinstance(exc, OmegaConfBaseException) else exc
                # Also what torch or a user's component raises: a doctor that crashes helps nobody.
                text = f"{error.where} cannot be used" if isinstance(error, HeadAdaptError) else str(error)
                self._made[key] = PartMissing(part, error, " ".join(text.split())[:200] or type(error).__name__)
        if isinstance(self._made[key], PartMissing):
            raise self._made[key]
        return self._made[key]

    # -- datasets ------------------------------------------------------------------------------------------------------

    @property
    def train_names(self) -> tuple[str, ...]:
        return self._names("TRAIN")

    @property
    def test_names(self) -> tuple[str, ...]:
        return self._names("TEST")

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The registered datasets of ``DATASETS.TRAIN`` and ``DATASETS.TEST``, each once."""
        return tuple(dict.fromkeys((*self.train_names, *self.test_names)))

    def _names(self, which: str) -> tuple[str, ...]:
        names = self.part("registered").DATASETS[which]
        if isinstance(names, str):
            # Of TRAIN it is one dataset, as for detectron2's loaders; of TEST an error of its own.
            names = (names,) if which == "TRAIN" else ()
        return tuple(n for n in names if n in DatasetCatalog)

    def json_path(self, name: str) -> str | None:
        """Look up the annotation file of a dataset, where its metadata names one."""
        path = MetadataCatalog.get(name).get("json_file")
        return None if path is None else os.fspath(path)

    def small(self, name: str) -> bool:
        """Tell whether this run may read a dataset's annotations: always, except in the trainer's quick run."""
        if not self.quick:
            return True
        path = self.json_path(name)
        return path is not None and os.path.isfile(path) and os.path.getsize(path) <= QUICK_BYTES

    def raw_json(self, name: str) -> dict[str, Any] | None:
        """Parse the annotation file of a dataset, once; ``None`` where it has none that is a JSON mapping.

        Raises:
            PartMissing: the file is not there or damaged; part ``raw_json of NAME``.
        """
        part = f"raw_json of {name}"
        found: dict[str, Any] | None = self._kept(("json", name), part, lambda: _read_json(self.json_path(name)))
        return found

    def dicts(self, name: str) -> list[dict[str, Any]]:
        """Load the dataset dicts that detectron2's catalog gives, once.

        Raises:
            PartMissing: loading raised; part ``dicts of NAME``.
        """
        self.part("registered")
        found: list[dict[str, Any]] = self._kept(("dicts", name), f"dicts of {name}", lambda: DatasetCatalog.get(name))
        return found


def _read_json(path: str | None) -> dict[str, Any] | None:
    if path is None or not path.lower().endswith(".json"):
        return None
    try:
        with PathManager.open(path, "r", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            path, expected="a JSON file", found=f"{type(error).__name__}: {error}", fix="Correct the path or the file."
        ) from error
    return found if isinstance(found, dict) else None
