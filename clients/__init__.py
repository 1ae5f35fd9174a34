"""Device side: the work that a SuperNode does for the devices in a message."""
