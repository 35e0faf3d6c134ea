"""Latency, parity, accuracy, and the machine that a number holds for. No torch."""
