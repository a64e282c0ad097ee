"""Made-up scans, to try everything without data."""
