"""Training, data, generation and file formats of the suite; the scripts beside this folder are its entries."""

__version__ = "0.1.0"
