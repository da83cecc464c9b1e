"""The model process: a zygote that forks hosts, which load, run and evict models. The only torch room."""
