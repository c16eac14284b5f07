#!/usr/bin/env python3
"""Train or evaluate from a LazyConfig. Takes what detectron2's own lazyconfig_train_net.py takes, and ``--import``."""

import sys

from d2_headadapt.engine import command, default_argument_parser, lazy_main

if __name__ == "__main__":
    sys.exit(command(lazy_main, default_argument_parser().parse_args()))
