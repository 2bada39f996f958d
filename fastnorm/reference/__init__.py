"""The kernel contract in readable NumPy, float64 inside: the backend 'numpy'."""
