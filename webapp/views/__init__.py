"""The routes, one module per resource. A view translates; it decides nothing."""
