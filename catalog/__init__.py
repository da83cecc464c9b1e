"""The catalogue: one YAML file per model, applied to the config DB by ``farmhand up`` and ``farmhand config apply``."""
