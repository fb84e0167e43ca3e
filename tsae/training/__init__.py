"""From a configuration to a trained autoencoder."""
