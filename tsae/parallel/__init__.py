"""Several processes on one run: shares of the batch, and shares of the dictionary."""
