"""``python -m d2_headadapt``."""

import sys

from .cli import main

sys.exit(main())
