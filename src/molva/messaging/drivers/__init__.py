"""One file for each broker. Nothing imports a driver: only a URL reaches one."""
