"""Classifiers made of text embeddings (CLIP, RegionCLIP, Detic)."""
