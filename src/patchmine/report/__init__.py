"""Pictures of what a method does, and one page that tells how runs went."""
