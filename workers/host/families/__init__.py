"""One module per kind of model, behind the protocol of ``protocol.py``; ``registry.py`` finds them by name."""
