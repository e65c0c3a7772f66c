"""The training loop and what it stands on: engine, optimizers, checkpoints, log.  Knows no method
by name.
"""
