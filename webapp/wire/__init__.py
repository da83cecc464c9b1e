"""The shapes that clients see: request bodies, answers and headers, in JSON and msgpack."""
