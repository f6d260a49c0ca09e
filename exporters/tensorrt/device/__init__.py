"""Files that are copied into every bundle and run on the device, where this package is not installed."""
