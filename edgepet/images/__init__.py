"""Pictures: files, pixels, and sets of them. No torch."""
