"""BatchNorm as torch modules: on one device, and synchronized across ranks."""
