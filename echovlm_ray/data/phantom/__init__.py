"""Ultrasound phantoms: synthetic pictures with known content, and the reports that are true of them.

They are a demonstration corpus. Nothing here was learnt from patients, and a model trained on it is no medical device.
"""
