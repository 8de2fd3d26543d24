"""Rollout gates: evaluates candidates with a dataset and the serving routers."""
