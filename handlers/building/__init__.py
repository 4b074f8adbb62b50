"""What makes a model's checkpoint: run where archives are built, in none of them. Imports no torch but to draw weights.

A converter, handlers/<name>/convert.py, is called with the published files (path in the archive -> where it lies now),
the folder to fill, and a ProgressBar. It raises CheckpointError for files that can't be used.
"""
