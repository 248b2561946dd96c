"""Data sets of other shapes, each turned into the one layout of collections; ``prepare`` is their command line."""
