"""Ready recipes as YAML files; `echovlm_ray.training.recipe` documents every field."""
