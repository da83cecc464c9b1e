"""The model process: a zygote that forks hosts, and the host that loads, runs and evicts models. The only torch room."""
