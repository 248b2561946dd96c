"""Pictures and pages of runs and their results."""
