"""The checkpointer: from a file to rows in the model, its optimizer and its averages."""
