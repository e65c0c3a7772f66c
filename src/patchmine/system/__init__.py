"""What the operating system is told: files that appear whole, memory that is kept or given back."""
