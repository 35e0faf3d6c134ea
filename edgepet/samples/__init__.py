"""Real weights and tasks out of ordinary packages."""
