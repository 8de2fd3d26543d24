"""The engine: scheduler, paged cache, step runner and sampler around the language backbone."""
