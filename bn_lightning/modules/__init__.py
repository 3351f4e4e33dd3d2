"""BatchNorm as torch modules: on one device, and synchronised over ranks."""
