"""Pure functions of tensors: masks, targets, losses, schedules; randomness comes in as noise."""
