"""PEFT adapter folders, in and out."""
