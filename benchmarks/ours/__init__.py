"""Stator itself as worker and client of the measures, written against its public names only."""
