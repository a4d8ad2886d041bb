"""eah_kernels against its float64 reference."""
