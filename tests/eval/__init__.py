"""eah eval."""
