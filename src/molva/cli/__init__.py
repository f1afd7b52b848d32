"""The ``molva`` command: one file for each noun, which parses and prints, nothing else."""
