"""Evaluates candidates for their gates: the dataset, the questions to the serving routers, and the figures."""
