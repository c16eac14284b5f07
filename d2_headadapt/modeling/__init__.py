"""Modules: box predictors, ROI heads, the image classifier, and the heads of tasks."""
