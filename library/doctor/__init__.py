"""What works on this machine: what is installed, and short trainings tried in every way that could work (the self test)."""
