"""How good a bundle's pictures are: samples and reconstructions against real images, each figure beside its floor."""
