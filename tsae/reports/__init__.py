"""What a person looks at: tables on the terminal, figures in a run directory."""
