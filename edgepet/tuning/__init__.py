"""Fit a method to images. Needs torch."""
