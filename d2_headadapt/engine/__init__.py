"""Training, evaluation, prediction, and the processes that they run in."""
