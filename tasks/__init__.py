"""The contract between web and workers: names, messages, codec, transport, and the client that submits and awaits."""
