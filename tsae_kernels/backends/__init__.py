"""The implementations of the operators, and the choice between them."""
