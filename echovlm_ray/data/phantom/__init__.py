"""Ultrasound phantoms: synthetic pictures with known content, and true reports about them.

They are a demonstration corpus without any patient data, and a model trained on it is not a medical device.
"""
