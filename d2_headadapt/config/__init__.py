"""The config keys of this package, and the plain settings read from them."""
