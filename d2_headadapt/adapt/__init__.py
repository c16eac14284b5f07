"""The pure core: class tables, layouts, and the plan of what happens to every tensor. No I/O, no config."""
