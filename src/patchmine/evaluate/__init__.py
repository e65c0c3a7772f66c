"""Measuring a frozen encoder: one file per protocol, all reading features through ``features.py``."""
