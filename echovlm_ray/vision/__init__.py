"""Image files in, embeddings out."""
