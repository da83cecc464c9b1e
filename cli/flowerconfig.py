"""Flower's settings, which it reads from this file (``--conf``). Addresses and ports are the command line's."""

tasks_columns = "name,args,state,received,runtime,worker,uuid"
"""``args`` are the model, the adapter and the tenant."""
max_tasks = 5000
purge_offline_workers = 60
"""Seconds."""
