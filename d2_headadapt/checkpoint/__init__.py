"""Load a checkpoint into a model: names, rows, optimizer state and averaged copies."""
