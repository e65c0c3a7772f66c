"""Settings of the methods, one file each; nothing here needs torch."""
