"""From files to batches.  Knows no method and no model."""
