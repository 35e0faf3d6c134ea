"""Any report as a table, a line or JSON, and progress."""
