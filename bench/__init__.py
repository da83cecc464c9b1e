"""What ``make bench`` runs: figures of a real farm beside the in-process ceiling of the same machine and minute."""
