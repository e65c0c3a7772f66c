"""Benchmarks: training steps against other implementations, and the loading of data."""
