"""Files on disk: writing, locking, reading with bounds; their names; JSON with checksums."""
