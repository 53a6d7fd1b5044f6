"""What works on this machine: the installation, and the self test, short trainings with many settings."""
