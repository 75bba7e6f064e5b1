"""Is the adapter faithful? Measures of a replacement model against its target."""
