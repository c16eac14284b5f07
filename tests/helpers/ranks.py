"""Jobs of several processes on one machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import multiprocessing

from d2_headadapt.engine.train import default_argument_parser, launch

FORKED = partial(multiprocessing.start_processes, start_method="fork")


def launch_forked(work: Callable[[argparse.Namespace], Any], processes: int, *opts: str) -> None:
    """Run ``work(args)`` in processes that meet as those of ``launch`` do; ``opts`` are ``args.opts``.

    Spawned processes import everything again, which is most of what a short job takes; forked ones do not. The caller
    must have started no thread.
    """
    # --num-gpus is how detectron2 calls the number of processes.
    arguments = default_argument_parser().parse_args(["--num-gpus", str(processes), "--dist-url", "auto", *opts])
    with patch("torch.multiprocessing.start_processes", FORKED):
        launch(work, arguments)
