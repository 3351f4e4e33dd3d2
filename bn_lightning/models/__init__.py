"""Networks, their initialisation, and the LightningModule that trains them."""
