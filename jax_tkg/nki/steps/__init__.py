"""The steps of the decode kernel; each takes the buffers it reads and writes."""
