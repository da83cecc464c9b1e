"""HTTP in, one call, HTTP out: the Flask application. Imports neither workers nor torch."""
