"""Run the command line as ``python -m d2_headadapt``."""

import sys

from .cli.parser import main

sys.exit(main())
