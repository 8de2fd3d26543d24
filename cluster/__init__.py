"""Configuration files for ready-made deployments."""
