"""Pure functions of tensors: masks, targets, losses, schedules.  Randomness is passed in as noise."""
