"""What came out: bits per byte by domain (bits), and the comparison of all models (table)."""
