"""Store: a capture of a teacher on disk that describes itself. Keyed by sample id and token offset, never by row or step."""
