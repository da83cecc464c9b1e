"""The worker's side of its hosts: what they are started with, the zygote, the links, the watchdog, the pool of all.

No torch here: the other side is ``workers.host``.
"""
