"""The command ``d2-headadapt``."""
