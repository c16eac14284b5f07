#!/usr/bin/env python3
"""Train or evaluate from a yaml. Takes what detectron2's own tools/train_net.py takes, and ``--import``."""

import sys

from d2_headadapt.engine import default_argument_parser, launch, main
from d2_headadapt.errors import HeadAdaptError

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    try:
        launch(main, args)
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
