"""Networks, their initialization, and the LightningModules that train them."""
