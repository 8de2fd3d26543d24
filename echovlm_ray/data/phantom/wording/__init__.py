"""Reports in words, in English and Chinese."""
