"""Encoders: one family a kind, and their weights in all formats."""
