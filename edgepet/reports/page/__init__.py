"""One self-contained page of results: what was measured, drawn and in tables, and what was not."""
