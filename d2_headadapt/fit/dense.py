from __future__ import annotations


def fit_dense(*a): raise NotImplementedError
