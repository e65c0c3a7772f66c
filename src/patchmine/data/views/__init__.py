"""What becomes of an item: crops, clips, colours."""
