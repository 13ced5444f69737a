"""How good a bundle's images are: samples and reconstructions against real images, each figure beside its floor."""
