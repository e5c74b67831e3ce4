"""The command line: composes the rooms, holds no logic of theirs."""
