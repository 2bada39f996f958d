"""The readable NumPy versions: kernels in float64 (the backend 'numpy'), the staged graph, the closed form."""
