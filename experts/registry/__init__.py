"""Registries of bundles: by organ and version, with copies on this machine."""
