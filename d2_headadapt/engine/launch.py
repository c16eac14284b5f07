"""Launch the processes that train from a command line: arguments, launch, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import detectron2.engine.defaults
import torch
from detectron2.engine import create_ddp_model
from detectron2.engine import default_argument_parser as stock_argument_parser
from detectron2.engine import launch as stock_launch
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from .. import said
from ..errors import INTERRUPTED, ConfigError, HeadAdaptError
from ..key import OUTPUT_DIR
from ..setup.arguments import add_import_argument


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Make detectron2's parser, with ``--import``.

    Args:
        epilog: the end of the help; detectron2's examples by default.
    """
    parser: argparse.ArgumentParser = stock_argument_parser(epilog)
    add_import_argument(parser)
    return parser


def log_to(folder: str) -> None:
    """Log what this package says to the screen and into a run's folder, which is made.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        said.log_to(folder, comm.get_rank())
    except OSError as exc:
        raise ConfigError(
            OUTPUT_DIR, expected="a folder, or a place for one", found=str(exc), fix="Name another folder."
        ) from exc


def command(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """Call :func:`launch`, with a user's mistake as one line on standard error and its exit code.

    Args:
        run: takes ``args`` in every process; its result is not used.
        args: of :func:`default_argument_parser`.

    Returns:
        The exit code: 0, or that of the error, also where it was met in a process that this one started.
    """
    try:
        launch(partial(_said, run), args)
    except HeadAdaptError as error:
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except ProcessExitedException as exc:
        return exc.exit_code
    return 0


def _said(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    try:
        run(args)
    except HeadAdaptError as error:
        several = comm.get_world_size() > 1
        print(f"{f'rank {comm.get_rank()}: ' if several else ''}error: {error}", file=sys.stderr, flush=True)
        if several:
            # A traceback from every process would bury the line.
            sys.exit(error.exit_code)
        raise
    except KeyboardInterrupt as stop:
        if comm.is_main_process():
            print(str(stop) or "stopped", file=sys.stderr, flush=True)
        if comm.get_world_size() > 1:
            sys.exit(INTERRUPTED)
        raise


def launch(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run ``run(args)`` in every process that the command line asks for, also where torchrun started this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _in_torchrun(run, args)
    return stock_launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _in_torchrun(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        result = run(args)
        # Nobody tears the group down while another process still talks in it.
        comm.synchronize()
        return result
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def ddp_without_gpus(device: str) -> Iterator[None]:
    """Let stock code wrap CPU models for several processes: it passes ``device_ids``, which DDP refuses there."""
    if device != "cpu":
        yield
        return

    def on_cpu(model: nn.Module, **kwargs: Any) -> nn.Module:
        wrapped: nn.Module = create_ddp_model(model, device_ids=None, **kwargs)
        return wrapped

    stock = detectron2.engine.defaults.create_ddp_model
    detectron2.engine.defaults.create_ddp_model = on_cpu
    try:
        yield
    finally:
        detectron2.engine.defaults.create_ddp_model = stock
