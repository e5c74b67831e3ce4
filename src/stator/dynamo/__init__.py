"""The reference's Python names: a worker or client written for it runs after changing `dynamo.` to `stator.dynamo.` in its imports.

`docs/dynamo.md` says of every name of the reference whether it is here, how it differs, or why it is not.
"""
