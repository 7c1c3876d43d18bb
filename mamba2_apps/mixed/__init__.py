"""Several domains at once: one backbone behind an adapter and a head for each."""
