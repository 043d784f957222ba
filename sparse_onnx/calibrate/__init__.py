"""Statistics of what linear layers read and of where tokens go, measured on the user's data."""
