"""Measuring a frozen encoder: one file per protocol, all on the features of ``features.py``."""
