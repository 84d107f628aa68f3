"""What a person writes: studies and spaces, in TOML."""
