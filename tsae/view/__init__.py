"""A page for browsing features: `python -m tsae.view RUN` writes one self-contained HTML file."""
