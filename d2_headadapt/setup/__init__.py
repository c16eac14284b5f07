"""Read ``--config-file``, settle its classes and build what it describes."""
