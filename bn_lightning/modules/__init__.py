"""BatchNorm as torch modules: on one device, by parts, and synchronized across ranks."""
