"""The leaf room: errors, settings, logs and clock. Imports no other room."""
