"""What users type: settings, overrides, recipes, and messages about them."""
