"""Datasets: registering them, their categories, and the labels of tasks."""
