"""What a task adds to a backbone: updates, branches and a head as data, and folding them. No torch."""
