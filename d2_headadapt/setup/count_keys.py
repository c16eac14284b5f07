"""Find the class-count keys of a config, and discover what each of them sizes.

A count key is every whole number of a yaml config under a name like ``NUM_CLASSES``, of whatever project, and every
argument like ``num_classes`` of a LazyConfig's model that is a number of its own. Each is changed by itself, so that
one label space moves at a time. Where the constructor asserts that two keys are equal, they move together; where
something else holds the count (a federated loss, a file with one row per class), that is taken away or grown.
"""

from __future__ import annotations

import copy
import json
import linecache
import re
import tempfile
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..adapt.class_axes import TensorFacts, class_sized, read_layouts
from ..adapt.discovery import ClassSized, CountFamily, Discovery, Stuck
from .build import building
from .shape_builds import observe_build

Counts = Mapping[str, int]
Build = Callable[[Counts], nn.Module]
Make = Callable[[Any, Mapping[str, Any]], nn.Module]
"""A config and values to write into it -> the model."""

STEPS = (1, 10)
"""Classes added in the two further builds: the first finds what follows the count, the second checks the line."""

_COUNT = re.compile(r"(^|_)NUM_(\w+_)?(CLASSES|KEYPOINTS|CATEGORIES)$", re.IGNORECASE)
_NO_COUNT = re.compile(r"FED_LOSS_NUM_CLASSES$", re.IGNORECASE)
"""How many negative classes a federated loss draws."""
_SPACES = (("keypoint", re.compile(r"keypoint|fcpose", re.I)), ("stuff", re.compile(r"sem_?seg|stuff|semantic", re.I)))


@dataclass(frozen=True)
class Lever:
    """Another way to build the model, in which something that holds the class count does not.

    Args:
        name: what is taken away or grown, in words.
        build: like the plain one.
    """

    name: str
    build: Build


def discover(
    build: Build, counts: Counts, *, spaces: Mapping[str, str] | None = None, levers: Sequence[Lever] = ()
) -> Discovery:
    """Build a model at several class counts, one key at a time, and read its class axes off the shapes.

    Args:
        build: makes the model on the CPU, with these counts in place of the config's.
        counts: key -> the config's own count.
        spaces: label space of a key, where its name does not tell.
        levers: tried, in this order, for keys that cannot be changed otherwise.

    Raises:
        ConfigError: the model cannot be built with the config's own counts.
    """
    return _Search(build, counts, spaces or {}, levers).run()


@dataclass
class _Way:
    """One way to build the model, and what it showed."""

    build: Build
    name: str = ""
    initialise: bool = False
    base: dict[str, TensorFacts] | None = None

    def look(self, counts: Counts) -> dict[str, TensorFacts]:
        return observe_build(lambda: self.build(counts), initialise=self.initialise)


class _Search:
    """The trials of one model."""

    def __init__(self, build: Build, counts: Counts, spaces: Mapping[str, str], levers: Sequence[Lever]) -> None:
        self.counts, self.spaces = dict(counts), spaces
        self.plain = _Way(build)
        self.levers = [_Way(lever.build, lever.name) for lever in levers]
        self.families: list[CountFamily] = []
        self.sized: dict[str, list[ClassSized]] = {}
        self.odd: dict[str, int] = {}
        self.unprobed: set[str] = set()

    def run(self) -> Discovery:
        start = time.perf_counter()
        with building():
            facts = self._base(self.plain)
        alone = {key: self._try(self.plain, (key,)) for key in self.counts}
        failed = [key for key, outcome in alone.items() if isinstance(outcome, Exception)]
        moving = [key for key, outcome in alone.items() if not isinstance(outcome, Exception) and outcome]
        # Partners that could not move either are the likeliest ones that must be equal.
        order = [*failed, *moving, *(key for key in self.counts if key not in (*failed, *moving))]
        stuck: list[Stuck] = []
        joined: set[str] = set()
        for key in failed:
            if key not in joined:
                joined.update(self._together(key, order) or self._levered(key, order) or ())
            if key not in joined:
                stuck.append(_stuck(key, self.counts[key], alone[key], self._tried(key, order)))
        for key in moving:
            if key not in joined:
                problem = self._solve(self.plain, (key,))
                if problem is not None:
                    stuck.append(_stuck(key, self.counts[key], problem))
        every = [x for family in self.families for x in self.sized[family.keys[0]] if x.tensor in facts]
        found, refused = read_layouts(facts, every, self.odd)
        moved = {key for family in self.families for key in family.keys}
        return Discovery(
            tuple(self.families),
            found,
            refused,
            tuple(key for key in self.counts if key not in moved and key not in {s.key for s in stuck}),
            tuple(stuck),
            tuple(name for name in facts if name in self.unprobed),
            round(time.perf_counter() - start, 3),
        )

    def _base(self, way: _Way) -> dict[str, TensorFacts]:
        if way.base is None:
            try:
                way.base = way.look(self.counts)
            except Exception:  # A constructor that reads what an initialiser wrote may raise anything.
                way.initialise = True
                way.base = way.look(self.counts)
        return way.base

    def _try(self, way: _Way, keys: Sequence[str]) -> bool | Exception:
        """Try whether any shape changes when one class is added under ``keys``; return what was raised if it cannot."""
        try:
            base = self._base(way)
            more = way.look({**self.counts, **{key: self.counts[key] + STEPS[0] for key in keys}})
        except Exception as exc:  # Somebody's constructor may raise anything; it is kept and shown.
            traceback.clear_frames(exc.__traceback__)  # Half a model hangs on them.
            return exc
        return {n: f.shape for n, f in base.items()} != {n: f.shape for n, f in more.items()}

    def _partners(self, key: str, order: Sequence[str]) -> Iterator[tuple[str, ...]]:
        equal = [other for other in order if other != key and self.counts[other] == self.counts[key]]
        yield from ((key, other) for other in equal)
        if len(equal) > 1:
            yield (key, *equal)

    def _together(self, key: str, order: Sequence[str], way: _Way | None = None) -> tuple[str, ...] | None:
        for keys in self._partners(key, order):
            if self._try(way or self.plain, keys) is True and self._solve(way or self.plain, keys) is None:
                return keys
        return None

    def _levered(self, key: str, order: Sequence[str]) -> tuple[str, ...] | None:
        for way in self.levers:
            if self._try(way, (key,)) is True and self._solve(way, (key,)) is None:
                return (key,)
            keys = self._together(key, order, way)
            if keys:
                return keys
        return None

    def _solve(self, way: _Way, keys: tuple[str, ...]) -> Exception | None:
        """Enter a family of keys with what it sizes; return what was raised where a build fails."""
        value = self.counts[keys[0]]
        base, more = self._base(way), {}
        try:
            for step in STEPS:
                more[step] = way.look({**self.counts, **dict.fromkeys(keys, value + step)})
        except Exception as exc:  # As above.
            return exc
        built = (value, *(value + step for step in STEPS))
        family = CountFamily(keys, value, self._space(keys), built, way.name)
        sized = class_sized(base, more, family)
        self.families.append(family)
        self.sized[keys[0]] = sized
        self.unprobed.update(name for name in self.plain.base or {} if name not in base)
        for name, fact in more[STEPS[-1]].items():
            if fact.odd_row is not None:
                self.odd[name] = 0 if fact.odd_row == 0 else -1
        return None

    def _space(self, keys: Sequence[str]) -> str:
        told = [self.spaces.get(key) or space_of_key(key) for key in keys]
        return next((space for space in told if space), "thing")

    def _tried(self, key: str, order: Sequence[str]) -> tuple[str, ...]:
        together = [f"together with {' and '.join(keys[1:])}" for keys in self._partners(key, order)]
        return (*together, *(f"with {way.name}" for way in self.levers))


def _stuck(key: str, value: int, problem: bool | Exception | None, tried: tuple[str, ...] = ()) -> Stuck:
    """Describe a key with what was raised when it was changed, and where."""
    if not isinstance(problem, Exception):
        return Stuck(key, value, "", "", tried)
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    code = linecache.getline(frame.filename, frame.lineno or 0).strip()
    error = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
    return Stuck(key, value, error, f"{frame.filename}:{frame.lineno}: {code}", tried)


def space_of_key(key: str) -> str:
    """Tell a count key's label space by its name; empty where it tells none, as in ``MODEL.POINT_HEAD``."""
    told = next((space for space, words in _SPACES if words.search(key)), "")
    return told or ("" if "POINT_HEAD" in key.upper() else "thing")


def count_keys(config: Any) -> dict[str, int]:
    """List the class-count keys of a yaml config or of the model of a LazyConfig, with their numbers.

    Args:
        config: a ``CfgNode``, or the ``model`` node of a LazyConfig (whose paths then begin with ``model``).

    Example:
        >>> from detectron2.config import get_cfg
        >>> sorted(count_keys(get_cfg()))[:2]
        ['MODEL.RETINANET.NUM_CLASSES', 'MODEL.ROI_HEADS.NUM_CLASSES']
    """
    return {
        path: value
        for path, value in _leaves(config)
        if type(value) is int and value > 0 and _is_count(path.rpartition(".")[2])
    }


def _is_count(name: str) -> bool:
    return bool(_COUNT.search(name)) and not _NO_COUNT.search(name)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a config with its path; interpolations and missing values of a LazyConfig are none."""
    if isinstance(node, CfgNode):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, DictConfig):
        for key in map(str, node):
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from _leaves(node._get_node(key), f"{path or 'model'}.{key}")
    elif isinstance(node, ListConfig):
        for i in range(len(node)):
            if not OmegaConf.is_interpolation(node, i):
                yield from _leaves(node._get_node(i), f"{path}[{i}]")
    else:
        yield path, node._value() if hasattr(node, "_value") else node


def write_values(config: Any, values: Mapping[str, Any]) -> None:
    """Write values under their paths; the config is a copy that belongs to the caller."""
    for path, value in values.items():
        *way, last = re.split(r"\.|(?=\[)", path)
        node = config
        for name in way if isinstance(config, CfgNode) else way[1:]:
            node = node[int(name[1:-1])] if name.startswith("[") else node[name]
        node[last] = value


def discover_yaml(cfg: CfgNode, build: Callable[[CfgNode], nn.Module] = build_model) -> Discovery:
    """Run :func:`discover` on a yaml config; the same content is looked at once in a process.

    Args:
        cfg: with the keys of its project; not changed.
        build: the project's own builder, where it has one.

    Raises:
        ConfigError: the model cannot be built.
    """
    config = cfg.clone()
    config.defrost()
    config.MODEL.DEVICE = "cpu"
    described = config.clone()
    described.OUTPUT_DIR = described.MODEL.WEIGHTS = ""

    def make(base: CfgNode, values: Mapping[str, Any]) -> nn.Module:
        changed = base.clone()
        changed.defrost()
        write_values(changed, values)
        return build(changed)

    return _remembered(("yaml", described.dump(), build), build, lambda: _free_of_tables(config, make))


def _free_of_tables(config: CfgNode, make: Make) -> Discovery:
    """Discover with the class tables of our heads taken away, which they take their count from in place of the key."""
    if "HEAD_ADAPT" not in config.MODEL:
        return _discover_config(config, make)
    free = config.clone()
    for key in free.MODEL.HEAD_ADAPT:
        if key.startswith("TARGET_CLASSES"):
            free.MODEL.HEAD_ADAPT[key] = None
    without_data = free.clone()
    without_data.DATASETS.TRAIN = ()
    problem: Exception | None = None
    # A project that reads the name of the training set cannot do without one, nor a text classifier without a table.
    for base in (without_data, free):
        try:
            observe_build(partial(make, base, {}))
        except Exception as exc:  # Somebody's constructor may raise anything.
            problem = exc
        else:
            return _discover_config(base, make)
    found = _discover_config(config, make)
    held = tuple(_stuck(key, count_keys(config)[key], problem, ("without TARGET_CLASSES",)) for key in found.idle)
    return replace(found, idle=(), stuck=(*found.stuck, *held))


def discover_lazy(model: DictConfig) -> Discovery:
    """Run :func:`discover` on the model of a LazyConfig; the same content is looked at once in a process.

    Args:
        model: its ``model`` node; not changed. Interpolations stay, and follow what they point to.

    Raises:
        ConfigError: the model cannot be built.
    """

    def make(base: DictConfig, values: Mapping[str, Any]) -> nn.Module:
        changed = copy.deepcopy(base)
        write_values(changed, values)
        _on_the_cpu(changed)
        built: nn.Module = instantiate(changed)
        return built

    try:
        described = repr(OmegaConf.to_container(model, resolve=True))
    except OmegaConfBaseException:
        return _discover_config(model, make)  # The build will say what cannot be resolved.
    return _remembered(("lazy", described, None), model, lambda: _discover_config(model, make))


def _on_the_cpu(node: Any) -> None:
    """Write ``cpu`` over every ``device`` argument, in place."""
    if isinstance(node, DictConfig):
        for key in map(str, node):
            if key == "device":
                node[key] = "cpu"
            elif not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                _on_the_cpu(node._get_node(key))
    elif isinstance(node, ListConfig):
        for i in range(len(node)):
            if not OmegaConf.is_interpolation(node, i):
                _on_the_cpu(node._get_node(i))


def _discover_config(config: Any, make: Make) -> Discovery:
    counts = count_keys(config)
    with tempfile.TemporaryDirectory() as folder:
        return discover(lambda c: make(config, c), counts, levers=list(_levers(config, counts, make, Path(folder))))


def _levers(config: Any, counts: Counts, make: Make, folder: Path) -> Iterator[Lever]:
    """List what may hold a class count: a federated loss, and files with one row per class."""
    leaves = list(_leaves(config))
    off = {path: False for path, value in leaves if value is True and re.search(r"fed_?loss", path, re.I)}
    files = [(path, value) for path, value in leaves if isinstance(value, str) and _rows_of(value)]

    def grown(chosen: Counts, without: Mapping[str, Any]) -> nn.Module:
        steps = {counts[key]: number - counts[key] for key, number in chosen.items() if number != counts[key]}
        copies = {path: _grow(Path(value), steps, folder) for path, value in files}
        values = {path: str(made) for path, made in copies.items() if made is not None}
        with _grown_metadata(steps):
            return make(config, {**chosen, **without, **values})

    # A grown copy first: it leaves every tensor in place.
    names = " and ".join([*(path for path, _ in files), *(["class_image_count"] if off else [])])
    without = f"{' and '.join(off)} off"
    if names:
        yield Lever(f"a grown copy of {names}", lambda c: grown(c, {}))
    if off:
        yield Lever(without, lambda c: make(config, {**c, **off}))
    if files and off:
        yield Lever(f"{without} and a grown copy of {names}", lambda c: grown(c, off))


@contextmanager
def _grown_metadata(steps: Mapping[int, int]) -> Iterator[None]:
    """Let datasets count the images of as many classes more as were added (LVIS does), for the builds inside."""
    before: list[tuple[dict[str, Any], list[Any]]] = []
    for name in MetadataCatalog.list():
        values = vars(MetadataCatalog.get(name))
        rows = values.get("class_image_count")
        if isinstance(rows, list) and len(rows) in steps:
            before.append((values, rows))
            values["class_image_count"] = [*rows, *rows[-1:] * steps[len(rows)]]
    try:
        yield
    finally:
        for values, rows in before:
            values["class_image_count"] = rows


def _rows_of(value: str) -> bool:
    return value.endswith((".npy", ".pth", ".pt", ".json")) and Path(value).is_file()


def _grow(path: Path, steps: Mapping[int, int], folder: Path) -> Path | None:
    """Write a copy with as many rows more as classes were added; ``None`` where the file has no row per class."""
    made = folder / f"{abs(hash((str(path), tuple(steps.items()))))}{path.suffix}"
    if path.suffix == ".json":
        with suppress(ValueError, OSError):
            rows = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(rows, list) and len(rows) in steps:
                made.write_text(json.dumps([*rows, *rows[-1:] * steps[len(rows)]]), encoding="utf-8")
                return made
        return None
    with suppress(ValueError, OSError, RuntimeError):
        is_array = path.suffix == ".npy"
        array = np.load(path) if is_array else torch.load(path, map_location="cpu", weights_only=True)
        table = torch.as_tensor(array) if is_array else array
        axes = [axis for axis, size in enumerate(table.shape) if size in steps] if torch.is_tensor(table) else []
        if axes:
            last = table.narrow(axes[0], table.shape[axes[0]] - 1, 1)
            larger = torch.cat([table, *[last] * steps[table.shape[axes[0]]]], axes[0])
            if is_array:
                np.save(made, larger.numpy())
            else:
                torch.save(larger, made)
            return made
    return None


_REMEMBERED: OrderedDict[tuple[str, str, Any], tuple[Discovery, Any]] = OrderedDict()
_MOST = 32


def _remembered(key: tuple[str, str, Any], keep: Any, make: Callable[[], Discovery]) -> Discovery:
    """Look up what was discovered under ``key``; ``keep`` stays alive, so that no address in a key is used again."""
    if key not in _REMEMBERED:
        _REMEMBERED[key] = make(), keep
        while len(_REMEMBERED) > _MOST:
            _REMEMBERED.popitem(last=False)
    return _REMEMBERED[key][0]
