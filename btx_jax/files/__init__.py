"""Files: written, locked, and read with bounds; names; JSON with checksums."""
