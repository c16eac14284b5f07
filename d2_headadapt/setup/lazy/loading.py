"""Read a LazyConfig: the ``.py``, overrides, and paths relative to the file that has them."""

from __future__ import annotations

import ast
import builtins
import difflib
import logging
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...data.entry import absolute_entries
from ...errors import ConfigError, HeadAdaptError, UsageError
from ...key import Form, Key, form_of, speaking
from ..components import import_components
from ..yaml import beside_config

logger = logging.getLogger(__name__)
# Bound here, because `run` changes the class's own: it settles a config after its last override, not after each.
_stock_overrides = LazyConfig.apply_overrides
NODE = "head_adapt"
"""The node of a LazyConfig that holds this package's keys."""


@speaking(Form.LAZY)
def load_lazy_config(config_file: str, opts: Sequence[str] = (), imports: Sequence[str] = ()) -> DictConfig:
    """Read a LazyConfig with its overrides; nothing is resolved or instantiated.

    Args:
        config_file: a ``.py``.
        opts: overrides, ``key=value``.
        imports: modules or ``.py`` files that register components, see :mod:`d2_headadapt.setup.components`.

    Raises:
        ConfigError: a file that is missing or raises, or that has no model.
        UsageError: an override that cannot be read or applied, or an import that fails.
    """
    import_components(imports)
    if not os.path.isfile(config_file) and "://" not in config_file:
        raise ConfigError(
            "--config-file", expected="a .py file", found=f"no file {config_file!r}", fix="Correct the path."
        )
    try:
        with paths_of_each_file():
            cfg: DictConfig = LazyConfig.load(config_file)
    except HeadAdaptError:
        raise
    except Exception as exc:
        raise _not_loaded(config_file, exc) from exc
    if NODE not in cfg:
        _refuse_lost_node(config_file)
    weights = OmegaConf.select(cfg, "train.init_checkpoint", throw_on_missing=False)
    if isinstance(weights, str):
        cfg.train.init_checkpoint = beside_config(weights, config_file)
    _override(cfg, opts)
    if not is_lazy(cfg):
        raise ConfigError(
            config_file,
            expected="a node `model` made with LazyCall",
            found=f"the nodes {', '.join(map(str, cfg)) or 'none'}",
            fix="Write model = L(...)(...), or import one: from .base import model.",
        )
    make_absolute(cfg.get(NODE), os.getcwd())
    return cfg


def _refuse_lost_node(config_file: str) -> None:
    """Raise where the file has a ``head_adapt`` that is no dict: detectron2 leaves such a value out of a config."""
    with PathManager.open(config_file) as file:
        statements = ast.parse(file.read()).body
    named = [one for one in statements if isinstance(one, (ast.Assign, ast.AnnAssign)) and _stores(one)]
    if named and named[-1].value is not None:
        raise ConfigError(
            f"{config_file}, line {named[-1].lineno}, {NODE}",
            expected="a dict of keys",
            found=ast.unparse(named[-1].value),
            fix=f'Write {NODE} = dict(source_classes="coco"), or leave it out.',
        )


def _stores(statement: ast.stmt) -> bool:
    names = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return any(name.id == NODE and isinstance(name.ctx, ast.Store) for name in names)


@contextmanager
def in_words_of(config_file: str) -> Iterator[None]:
    """Let every message meanwhile name keys as ``config_file`` has them.

    Raises:
        ConfigError: an interpolation of a LazyConfig leads nowhere, or a value is missing.
    """
    with speaking(form_of(config_file)):
        try:
            yield
        except OmegaConfBaseException as error:
            raise unresolved(error, config_file) from error


def unresolved(error: OmegaConfBaseException, config_file: str) -> ConfigError:
    """Make the error for an interpolation that leads nowhere, or a missing value."""
    return ConfigError(
        str(error.full_key or config_file),
        expected="a value, or an interpolation of one that exists",
        found=str(error).splitlines()[0],
        fix="Correct it, or write the value itself.",
    )


def is_lazy(cfg: Any) -> bool:
    """Tell whether ``cfg`` is a LazyConfig with a model."""
    if not isinstance(cfg, DictConfig) or "model" not in cfg:
        return False
    return isinstance(cfg.model, DictConfig) and "_target_" in cfg.model


@contextmanager
def paths_of_each_file() -> Iterator[None]:
    """Make the paths of ``head_adapt.register`` absolute in every file that is loaded, base files included.

    Who imports ``head_adapt`` from a base file gets the base file's object, which no longer says where it is from; so
    it is settled when its file was executed. A config file reaches others by a relative import, which detectron2 runs
    in an import function of its own, or by ``LazyConfig.load`` and ``load_rel``.
    """
    from detectron2.config import lazy

    stock_patch, stock_load = lazy._patch_import, LazyConfig.load

    @contextmanager
    def patch_import() -> Iterator[Any]:
        with stock_patch() as stock_import:

            def run(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
                module = stock_import(name, globals, locals, fromlist, level)
                if level and hasattr(module, NODE) and str(getattr(module, "__file__", "")).endswith(".py"):
                    make_absolute(getattr(module, NODE), os.path.dirname(os.path.abspath(str(module.__file__))))
                return module

            builtins.__import__ = run
            yield run

    def load(filename: str, keys: Any = None) -> Any:
        loaded = stock_load(filename, keys)
        folder = os.path.dirname(os.path.abspath(filename))
        if keys is None:
            make_absolute(loaded.get(NODE), folder)
        else:
            pairs = [(keys, loaded)] if isinstance(keys, str) else zip(keys, loaded, strict=True)
            make_absolute(dict(pairs).get(NODE), folder)
        return loaded

    lazy._patch_import, LazyConfig.load = patch_import, staticmethod(load)
    imports = builtins.__import__
    try:
        yield
    finally:
        # detectron2 does not put it back where a config file raises.
        builtins.__import__ = imports
        lazy._patch_import, LazyConfig.load = stock_patch, staticmethod(stock_load)


def make_absolute(node: Any, folder: str) -> None:
    """Make the paths under ``register`` of a ``head_adapt`` node absolute, in place; those that are already stay.

    Args:
        node: a dict, as a file that was just executed has it, or a node; anything else is left alone.
        folder: what a path is relative to.
    """
    entries = node.get("register") if isinstance(node, (dict, DictConfig)) else None
    # What is no list is refused where the node is read.
    if isinstance(entries, (list, tuple, ListConfig)):
        plain = OmegaConf.to_container(entries, resolve=True) if OmegaConf.is_config(entries) else entries
        node["register"] = absolute_entries(cast("list[Any]", plain), folder)


def _not_loaded(config_file: str, exc: Exception) -> ConfigError:
    cause: Any = exc.__cause__ if isinstance(exc, SyntaxError) and exc.__cause__ is not None else exc
    frames = traceback.extract_tb(exc.__traceback__)
    # Statements of files, not functions of libraries that they call.
    own = [f for f in frames if f.filename.endswith(".py") and f.name == "<module>"]
    line = cause.lineno if isinstance(cause, SyntaxError) else None
    # detectron2 parses a file under no name, and names it in an exception around Python's.
    named = re.search(r"Config file (.*) has syntax error", str(exc))
    where = f"{named[1] if named else config_file}, line {line}" if line else config_file
    if not line and own:
        where = f"{own[-1].filename}, line {own[-1].lineno}"
    return ConfigError(
        where,
        expected="a LazyConfig that can be executed",
        found=" ".join(f"{type(cause).__name__}: {cause}".split()),
        fix="Correct the file.",
    )


def _override(cfg: DictConfig, opts: Sequence[str]) -> None:
    known = [key for key in _keys(cfg) if not key.rpartition(".")[2].startswith("_")]
    for text in opts:
        key, equals, _ = text.partition("=")
        key = key.lstrip("+")
        if text.startswith("--"):
            raise UsageError(
                f"command line, {text!r}",
                expected="options before the first key=value",
                found="one behind it",
                fix=f"Move {text} in front.",
            )
        if not equals or re.fullmatch(r"[A-Z][A-Z_]*(\.[A-Z0-9_]+)*", key):
            raise UsageError(
                f"command line, {text!r}",
                expected="key=value, as in train.max_iter=100",
                found="a key as YAML configs have it" if equals or re.fullmatch(r"[A-Z_.]+", text) else "no '='",
                fix=f"Write it as a LazyConfig's.{_lazy_name(key)}",
            )
        is_new = OmegaConf.select(cfg, key, throw_on_missing=False) is None and key not in known
        try:
            _stock_overrides(cfg, [text])
        except Exception as exc:
            raise UsageError(
                f"command line, {text!r}",
                expected="an override that LazyConfig can apply",
                found=" ".join(f"{type(exc).__name__}: {exc}".split())[:300],
                fix="Put lists and text with special characters in quotes: 'key=[one,two]'.",
            ) from exc
        # A key of this package is checked later; of the others, only a slip of the finger is told from a new key.
        near = difflib.get_close_matches(key, known, 1, cutoff=0.9) if is_new and not key.startswith(NODE) else []
        if near:
            logger.warning("%s is a key that this config did not have. Nearest: %r.", key, near[0])


def _lazy_name(key: str) -> str:
    name = Key(key).lazy
    return f" {key!r} is {name} there." if name != key else ""


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in map(str, node) if isinstance(node, DictConfig) and not node._is_none() else ():
        yield f"{prefix}{key}"
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield from _keys(node._get_node(key), f"{prefix}{key}.")
