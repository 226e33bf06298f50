"""The LightningModules: training of priors and reconstruction with them."""
