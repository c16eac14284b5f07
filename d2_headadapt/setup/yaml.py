"""Read a yaml config and settle it: components, keys, datasets, classes, device. From command line to frozen config."""

from __future__ import annotations

import ast
import io
import logging
import operator
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..adapt.classes import KEY_SUFFIXES, ClassTable, did_you_mean
from ..adapt.planner import target_key
from ..config.keys import add_headadapt_config
from ..config.settings import AdaptSettings, write_tables
from ..data.datasets import absolute_entries, check_same_classes, dataset_table, register_datasets, training_table
from ..data.task_datasets import say_about_tasks, settle_tasks
from ..data.task_spec import complete_tasks
from ..errors import ConfigError, DatasetError, UsageError
from ..key import DATASETS, HEAD_ADAPT, MODEL, TASKS, YAML
from ..modeling.text.preflight import refuse_text
from ..said import be_heard
from .class_counts import settle_counts
from .components import add_component_keys, import_components
from .keep import check_labels, settle_keep
from .task_checks import check_tasks
from .typed import not_of_type

logger = logging.getLogger(__name__)


PYTHON_TAG = "tag:yaml.org,2002:python/"
PLAIN_TAGS = {
    **dict.fromkeys(("tuple", "list"), "seq"),
    **dict.fromkeys(("str", "unicode"), "str"),
    **dict.fromkeys(("int", "long"), "int"),
    **{name: name for name in ("bool", "float")},
    **{"dict": "map", "none": "null"},
}
"""Python tags of PyYAML that say no more than YAML's own; the zoo's yamls have ``!!python/tuple``."""
EVAL_TAG = f"{PYTHON_TAG}object/apply:eval"
"""Has a text that Python shall run; detectron2's own ``Base-RetinaNet.yaml``, which many copy, has its anchors so."""
OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
LARGEST = 1e9
"""Of the numbers that :func:`calculated` works with: it shall take no time, whatever the text says."""
TRUST_KEY = HEAD_ADAPT.TRUST_FILE


class PathAwareCfgNode(CfgNode):
    """A config whose ``DATASETS.REGISTER`` paths are relative to the yaml that holds them, base files included.

    A yaml runs nothing: stock detectron2 reads one with ``yaml.unsafe_load`` where a tag asks for that.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        loaded: dict[str, Any] = super().load_yaml_with_base(filename, allow_unsafe=allow_unsafe)
        settle_yaml(loaded, filename)
        return loaded

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        file: IO[str] = super()._open_cfg(filename)
        with file:
            text = file.read()
        return io.StringIO(plain_yaml(text, filename) if "!" in text else text)


class TrustedCfgNode(PathAwareCfgNode):
    """The same for a yaml whose author the user trusts: its tags may run code."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        return CfgNode._open_cfg(filename)  # type: ignore[no-any-return]


def plain_yaml(text: str, filename: str) -> str:
    """Replace :data:`PLAIN_TAGS` in a yaml's text by YAML's own tags.

    Raises:
        ConfigError: a tag that would run code or name an object of a program.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    changed = False
    waiting, seen = [root] if root is not None else [], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag.startswith(PYTHON_TAG) and node.tag.removeprefix(PYTHON_TAG) in PLAIN_TAGS:
            node.tag = f"tag:yaml.org,2002:{PLAIN_TAGS[node.tag.removeprefix(PYTHON_TAG)]}"
            changed = True
        elif node.tag == EVAL_TAG and (value := _calculated_node(node)) is not None:
            # In place, because the node above holds this one.
            node.tag, node.value = value.tag, value.value
            changed = True
        elif node.tag not in yaml.SafeLoader.yaml_constructors:
            raise ConfigError(
                f"{filename}, line {node.start_mark.line + 1}",
                expected="plain values",
                found=f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')}, which may run code",
                fix=f"Write the value itself. If you know the author, add {TRUST_KEY.set(True)} to the command.",
            )
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
    return yaml.serialize(root, Dumper=yaml.SafeDumper) if changed else text


def _calculated_node(node: yaml.Node) -> yaml.Node | None:
    """Calculate what a node of :data:`EVAL_TAG` asks for; ``None`` where that is more than numbers and lists."""
    texts = [one.value for one in node.value] if isinstance(node, yaml.SequenceNode) else []
    if len(texts) != 1 or not isinstance(texts[0], str):
        return None
    try:
        return yaml.compose(yaml.safe_dump(calculated(texts[0])), Loader=yaml.SafeLoader)
    except (ArithmeticError, KeyError, RecursionError, SyntaxError, TypeError, ValueError):
        return None


def calculated(text: str) -> Any:
    """Evaluate numbers, lists, ``+ - * / **`` and ``[... for x in ...]``; nothing can be called or looked up.

    Raises:
        ValueError: anything else, or a number over :data:`LARGEST`.
    """

    def value(node: ast.expr, names: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and abs(node.value) <= LARGEST:
            return node.value
        if isinstance(node, ast.Name):
            return names[node.id]
        if isinstance(node, (ast.List, ast.Tuple)):
            return [value(one, names) for one in node.elts]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand, names)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left, names), value(node.right, names)
            if isinstance(left, list) or isinstance(right, list) or (type(node.op) is ast.Pow and abs(right) > 64):
                raise ValueError("more than arithmetic")
            found = OPERATORS[type(node.op)](left, right)
            if abs(found) <= LARGEST:
                return found
        if isinstance(node, ast.ListComp) and len(node.generators) == 1 and not node.generators[0].ifs:
            loop = node.generators[0]
            if isinstance(loop.target, ast.Name):
                return [value(node.elt, {**names, loop.target.id: one}) for one in value(loop.iter, names)]
        raise ValueError(f"{type(node).__name__} is more than arithmetic")

    return value(ast.parse(text.strip(), mode="eval").body, {})


def trusts_yaml(opts: Sequence[str]) -> bool:
    """Tell whether the command line, and not the file about itself, says that what is read may run code."""
    values = [value for key, value in zip(opts[::2], opts[1::2], strict=False) if key == TRUST_KEY.yaml]
    return bool(values) and str(values[-1]).lower() == "true"


def settle_yaml(loaded: dict[str, Any], filename: str) -> None:
    """Settle what a yaml says in its own place: paths become absolute, a task's ``on`` a string.

    Args:
        loaded: its content, with that of its base files, which came through here first; changed in place.
        filename: the yaml.

    Raises:
        ConfigError: a task, or a key of a task, that is there twice.
    """
    _refuse_duplicate_tasks(filename)
    datasets = loaded.get("DATASETS")
    entries = datasets.get("REGISTER") if isinstance(datasets, dict) else None
    if isinstance(datasets, dict) and isinstance(entries, (list, tuple)):
        datasets["REGISTER"] = absolute_entries(entries, os.path.dirname(os.path.abspath(filename)))
    model = loaded.get("MODEL")
    if isinstance(model, dict) and isinstance(model.get("WEIGHTS"), str):
        model["WEIGHTS"] = beside_config(model["WEIGHTS"], filename)
    tasks = (loaded.get("MODEL") or {}).get("TASKS") if isinstance(loaded.get("MODEL"), dict) else None
    for task in tasks.values() if isinstance(tasks, dict) else ():
        if isinstance(task, dict) and True in task:
            task["on"] = task.pop(True)  # A bare `on` is a truth value in YAML 1.1.


def beside_config(path: str, config_file: str) -> str:
    """Find a checkpoint from the working directory and, where nothing is there, from the config's folder.

    Args:
        path: as the config has it; what is absolute or an address stays.
        config_file: the file that holds it.
    """
    file, mark, query = path.partition("?")
    if not file or "://" in file or os.path.isabs(file) or os.path.isfile(file):
        return path
    other = os.path.join(os.path.dirname(os.path.abspath(config_file)), file)
    if not os.path.isfile(other):
        return path
    be_heard()
    said = "%s %s is not in the working directory: taken from beside %s, as %s."
    logger.info(said, MODEL.WEIGHTS, file, config_file, other)
    return f"{other}{mark}{query}"


def _refuse_duplicate_tasks(filename: str) -> None:
    """Raise for two equal keys in a yaml's tasks: PyYAML keeps the last without a word."""
    with PathManager.open(filename, "r") as file:
        node = yaml.compose(file, Loader=yaml.SafeLoader)
    for name in ("MODEL", "TASKS"):
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((value for key, value in pairs if key.value == name), None)
    place = TASKS
    below = [(place[key.value], value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []
    for where, mapping in ((place, node), *below):
        seen: dict[str, Any] = {}
        for key, _ in mapping.value if isinstance(mapping, yaml.MappingNode) else ():
            if key.value in seen:
                raise ConfigError(
                    f"{filename}, {where}",
                    expected="different names",
                    found=f"{key.value!r} in lines {seen[key.value]} and {key.start_mark.line + 1}",
                    fix="Rename or remove one of the two; YAML would keep the last.",
                )
            seen[key.value] = key.start_mark.line + 1


def load_config(config_file: str, opts: Sequence[str] = (), imports: Sequence[str] = ()) -> CfgNode:
    """Read a config with this package's keys and the user's components; nothing is resolved yet.

    Args:
        config_file: a yaml; empty for detectron2's defaults. Its tags run nothing unless ``opts`` say
            ``MODEL.HEAD_ADAPT.TRUST_FILE True``.
        opts: ``KEY VALUE`` pairs.
        imports: modules or ``.py`` files that register components, see :mod:`d2_headadapt.setup.components`.

    Raises:
        ConfigError: a missing or unreadable file, an unknown key, or a value of the wrong type.
        UsageError: an import that fails.

    Example:
        >>> from d2_headadapt import load_config
        >>> cfg = load_config("", ["MODEL.HEAD_ADAPT.SOURCE_CLASSES", "coco"])
        >>> cfg.MODEL.HEAD_ADAPT.SOURCE_CLASSES
        'coco'
    """
    modules = import_components(imports)
    cfg = get_cfg()
    add_headadapt_config(cfg)
    add_component_keys(cfg, modules)
    if config_file:
        if not os.path.isfile(config_file) and "://" not in config_file:
            raise ConfigError(
                "--config-file", expected="a yaml file", found=f"no file {config_file!r}", fix="Correct the path."
            )
        # The whole tree in one type, because yacs refuses to merge nodes of two.
        reader = (TrustedCfgNode if trusts_yaml(opts) else PathAwareCfgNode)(cfg)
        reader.MODEL.TASKS.set_new_allowed(True)  # Which a copy forgets.
        try:
            merge(reader, config_file, lambda: reader.merge_from_file(config_file))
        except ConfigError:
            _refuse_saved_lazy(config_file)
            raise
        cfg = CfgNode(reader)
        cfg.MODEL.TASKS.set_new_allowed(True)
    complete_tasks(cfg)
    refuse_words(opts)
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        merge(cfg, "command line", partial(cfg.merge_from_list, [key, value]))
    cfg.DATASETS.REGISTER = absolute_entries(cfg.DATASETS.REGISTER, os.getcwd())
    return cfg


def refuse_words(opts: Sequence[str]) -> None:
    """Raise for overrides that are no ``KEY VALUE`` pairs.

    Raises:
        UsageError: an option or a config among them, or a key without a value.
    """
    for word in opts[::2]:
        if word.startswith("--"):
            fix = f"Move {word} and what belongs to it in front of {opts[0]}."
            raise UsageError("command line", expected="options before KEY VALUE pairs", found=repr(word), fix=fix)
        if word.endswith((".yaml", ".yml")):
            fix = f"Type --config-file {shlex.quote(word)} instead."
            raise UsageError("command line", expected="KEY VALUE pairs", found=f"the file {word!r}", fix=fix)
    if len(opts) % 2:
        key, equals, value = opts[-1].partition("=")
        fix = f"Type {key} {shlex.quote(value)} instead." if equals and value else f"Type the value behind {key}."
        raise UsageError("command line", expected="KEY VALUE pairs", found=f"{opts[-1]!r} without a value", fix=fix)


def _refuse_saved_lazy(config_file: str) -> None:
    """Raise for the ``config.yaml`` of a LazyConfig's run, which has other keys than detectron2's yaml."""
    if not os.path.isfile(config_file):
        return
    with open(config_file, encoding="utf-8", errors="replace") as file:
        is_lazy = re.search(r"^model:$", file.read(), re.MULTILINE)
    if is_lazy:
        raise ConfigError(
            config_file,
            expected=f"a yaml with detectron2's keys, such as {MODEL.yaml}",
            found="a LazyConfig, as a run of one saves it",
            fix="Write a .py of two lines and give that: from detectron2.config import LazyConfig, and "
            f"globals().update(LazyConfig.load({os.path.abspath(config_file)!r})).",
        )


def _refuse_none(cfg: CfgNode) -> None:
    """Raise for a key of this package that is left empty; yacs takes that in place of any type."""
    default = get_cfg()
    add_headadapt_config(default)
    for node, own, place in (
        (cfg.MODEL.HEAD_ADAPT, default.MODEL.HEAD_ADAPT, HEAD_ADAPT),
        (cfg.MODEL.HEAD_ADAPT.FIT, default.MODEL.HEAD_ADAPT.FIT, HEAD_ADAPT.FIT),
        (cfg.MODEL.HEAD_ADAPT.TEXT, default.MODEL.HEAD_ADAPT.TEXT, HEAD_ADAPT.TEXT),
    ):
        for key, value in own.items():
            if value is not None and node.get(key, value) is None:
                raise ConfigError(
                    place[key],
                    expected=f"a value like {value!r}",
                    found="nothing",
                    fix="Remove the key, or give it a value.",
                )


def resolve_config(cfg: CfgNode, *, reads_labels: bool = True) -> AdaptSettings:
    """Register datasets, settle the class tables, and write class counts and device, in place.

    Args:
        cfg: not frozen; frozen on return.
        reads_labels: the run trains or evaluates, so the model's classes must be those of its datasets.

    Returns:
        AdaptSettings: to be attached to the model.

    Raises:
        HeadAdaptError: a dataset, class table or key that cannot be used.
    """
    settings = settle_config(cfg, reads_labels=reads_labels)
    for line in settle_counts(cfg, settings.target):
        logger.info(line)
    if settle_device(cfg.MODEL.DEVICE) == "cpu":
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return settings


def settle_config(
    cfg: CfgNode, *, reads_labels: bool = True, required: bool = True, region_width: int | None = None
) -> AdaptSettings:
    """Register datasets, settle the class tables and tasks, and write them into the config as plain lists, in place.

    This is the one place that asks datasets, files and vocabularies for names. Whoever reads the config afterwards, or
    the ``config.yaml`` that a run leaves behind, reads lists.

    Args:
        cfg: not frozen.
        reads_labels: see :func:`resolve_config`.
        required: raise for a training set that is not registered, instead of leaving its classes unknown.
        region_width: C of the region features, where it is known.

    Raises:
        HeadAdaptError: a dataset, class table or key that cannot be used.
    """
    _refuse_none(cfg)
    register_datasets(cfg.DATASETS.REGISTER)
    keeps = settle_keep(cfg, required=required and reads_labels)
    check_tasks(cfg)
    settle_tasks(cfg, required=required and reads_labels)
    say_about_tasks(cfg)
    named = [s for s, suffix in KEY_SUFFIXES.items() if cfg.MODEL.HEAD_ADAPT[f"TARGET_CLASSES{suffix}"] is not None]
    # Who names the classes needs no dataset to plan on a file.
    settings = AdaptSettings.from_config(cfg, required=required and (reads_labels or not named))
    for space in named if not reads_labels and not keeps else ():
        _say_what_wins(cfg, settings.target[space], space)
    if reads_labels and keeps:
        check_labels(cfg)
    elif reads_labels:
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            for space, table in settings.target.items():
                if dataset_table(name, space) is not None:
                    which = DATASETS.TRAIN if name in cfg.DATASETS.TRAIN else DATASETS.TEST
                    check_same_classes(table, name, space, which)
    for problem in refuse_text(cfg, settings.target.get("thing"), region_width=region_width):
        logger.warning("%s", problem.error)
    write_tables(cfg, settings.target)
    return settings


def settle_device(device: str) -> str:
    """Return ``device``, or ``cpu`` in place of a GPU on a machine without one, and log that."""
    try:
        torch.device(device)
    except RuntimeError as exc:
        fix = f"Set {MODEL.DEVICE.set('cuda')}."
        raise ConfigError(MODEL.DEVICE, expected="cpu, cuda or cuda:N", found=repr(device), fix=fix) from exc
    if not device.startswith("cuda") or torch.cuda.is_available():
        return device
    logger.info("%s is %s, but this machine has no CUDA: running on the CPU.", MODEL.DEVICE, device)
    return "cpu"


def _say_what_wins(cfg: CfgNode, target: ClassTable, space: str) -> None:
    try:
        trained = training_table(cfg.DATASETS.TRAIN, space)
    except DatasetError:
        return
    if trained is not None and trained != target:
        logger.info(
            "%s (%d classes) wins over the %d classes of %s.",
            target_key(space),
            len(target),
            len(trained),
            DATASETS.TRAIN,
        )


def merge(cfg: CfgNode, where: str, do: Callable[[], Any]) -> None:
    """Call ``do``, which merges something into ``cfg``, and turn what yacs raises into a message.

    Raises:
        ConfigError: with the place ``where``.
    """
    try:
        do()
    except ConfigError:
        raise  # A message already, of the reader; it is a ValueError as yacs's are.
    except (KeyError, AssertionError) as exc:
        # yacs says "Non-existent config key: A.B.C", and "Non-existent key: A.B.C" with another type.
        start, _, key = str(exc.args[0] if exc.args else "").rpartition("key: ")
        if "Non-existent" not in start:
            raise ConfigError(
                where, expected="a value of the key's type", found=str(exc), fix="Correct the value."
            ) from exc
        raise ConfigError(
            where, expected="a config key that exists", found=key, fix=f"Correct it.{did_you_mean(key, all_keys(cfg))}"
        ) from exc
    except (AttributeError, TypeError, yaml.YAMLError) as exc:
        raise ConfigError(
            where,
            expected=f"a {YAML} file of KEY: value lines",
            found=" ".join(str(exc).split()),
            fix="Correct the file.",
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(
            where, expected=f"a {YAML} file, which is text", found=str(exc), fix="Correct the path."
        ) from exc
    except OSError as exc:
        raise ConfigError(
            where, expected=f"a {YAML} file and base files that can be read", found=str(exc), fix="Correct the path."
        ) from exc
    except ValueError as exc:
        raise not_of_type(where, exc) from exc


def all_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yield every key of a config with its path."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key
