"""Every point at which a machine can stop, one after the other."""
