"""Check config, datasets, checkpoint, embeddings and model against each other, before any training."""
