"""Rollouts: one organ's experts are replaced under live traffic. States, database, history, controller, health."""
