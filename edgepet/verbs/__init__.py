"""What edgepet does: one verb a file."""
