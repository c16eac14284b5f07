"""Evaluators of datasets and of tasks, their metrics and pictures."""
