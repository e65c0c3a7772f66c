"""A run folder, and transfer in and out of it."""
