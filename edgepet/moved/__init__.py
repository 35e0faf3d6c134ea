"""Modules that the guides of 0.1 named, under the names that they had: ``edgepet.store`` and its like (ADR-0017).

The package finds them because this folder is on its path. They go with 0.2.
"""
