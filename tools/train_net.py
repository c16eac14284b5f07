#!/usr/bin/env python3
"""Train or evaluate from a yaml. Takes what detectron2's own tools/train_net.py takes, and ``--import``."""

import sys

from d2_headadapt.engine import command, default_argument_parser, main

if __name__ == "__main__":
    sys.exit(command(main, default_argument_parser().parse_args()))
