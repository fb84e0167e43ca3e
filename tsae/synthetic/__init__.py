"""A synthetic benchmark over time: features that follow hidden two-state chains, with the exact ceilings."""
