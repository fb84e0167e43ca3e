"""A page to look at features: `python -m tsae.view RUN` writes one HTML file that needs nothing else."""
