"""KV caches: layouts in memory, how numbers are stored, and caches that know their lengths."""
