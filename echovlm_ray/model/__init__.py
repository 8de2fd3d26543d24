"""EchoVLM on transformers: configuration, arithmetic, positions, loading, text and image processing."""
