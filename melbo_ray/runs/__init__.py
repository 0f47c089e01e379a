"""A run in storage: tables, manifest, units of work, queries. Imports no torch."""
