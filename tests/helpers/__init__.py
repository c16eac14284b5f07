"""Builders shared by the tests: tiny configs, datasets and files."""
