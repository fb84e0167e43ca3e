"""Plug-ins for other libraries. Each module imports its library, which the rest of `tsae` does not need."""
