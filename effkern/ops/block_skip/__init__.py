"""Per-sample block skipping."""
