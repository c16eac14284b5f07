"""From ``--config-file`` to what is built: configs read, classes settled, models made."""
