"""Datasets of ultrasound records: reading, checking, splitting and converting them."""
