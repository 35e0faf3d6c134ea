"""Backbones in torch: their layers, and what a task puts into them."""
