"""The kit Stator is tested with: fakes, a manual clock, conformance suites, recorded frames. For tests only."""
