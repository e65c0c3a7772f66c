"""The supervised tasks: one file per use of a backbone."""
