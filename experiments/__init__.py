"""Runs that are too long for a notebook. Each writes one file of `results/` a run, and resumes."""
