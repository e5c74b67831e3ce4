"""What workers say of their KV caches (`spec/40 §4–5`).

`hashing` names blocks of tokens, `events` are the messages, `publisher` brings them from an engine's threads to the event plane,
`engine_socket` takes them from the socket of an engine that has one; `sources` is what engines see of it.
"""
