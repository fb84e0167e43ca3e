"""Where `tsae` plugs into other libraries. Each module imports its library, which `tsae` itself does not need."""
