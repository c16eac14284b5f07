#!/usr/bin/env python3
"""Train or evaluate from a LazyConfig. Takes what detectron2's own lazyconfig_train_net.py takes, and ``--import``."""

import sys

from d2_headadapt.engine.launch import command, default_argument_parser
from d2_headadapt.engine.train_lazy import main

if __name__ == "__main__":
    sys.exit(command(main, default_argument_parser().parse_args()))
