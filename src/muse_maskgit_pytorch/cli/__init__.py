"""The `muse` command: `main` dispatches, `parser` makes keys of signatures, the rest does it."""
