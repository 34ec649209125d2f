"""The package as a whole: its walls, what importing it costs, and the wheel."""
