"""Where masters and moments live: formats, host memory, the ring through which they stream."""
