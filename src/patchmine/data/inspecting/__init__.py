"""What `patchmine data inspect` looks for, one file per subject."""
