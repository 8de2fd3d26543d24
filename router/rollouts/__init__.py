"""Replaces one organ's experts under live traffic: states, database, history, traffic, controller, health."""
