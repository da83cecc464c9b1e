"""The hand of operators and data teams: ``farmhand up`` and its siblings."""
