"""Bundles: one version of one organ's experts as files, written, checked, compared and signed."""
