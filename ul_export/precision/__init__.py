"""Lower precisions as a property of the exported graph: which nodes compute in them, and the check that they may."""
