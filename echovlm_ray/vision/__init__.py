"""Vision: decodes image files to frames, and encodes them to embeddings."""
