"""Ready recipes, YAML files; `echovlm_ray.training.recipe` says what every field does."""
