"""The native plane without I/O. Layout and rules: `docs/native-plane.md`."""
