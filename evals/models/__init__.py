"""Models that come from packages or are trained here."""
